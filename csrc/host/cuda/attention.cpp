// Attention forward on CUDA: chooses a kernel and a plan of its tiles, fills in the parameters, launches.
#include <algorithm>
#include <tuple>

#include "../../plan.h"
#include "arguments.h"

// A kernel is a line here; of those for a type and head_dim the first that fits serves.
#define RF_FORWARD_KERNELS(X) /* name, type, head_dim, keys of a tile, made for */ \
  X(rf_attention_forward_hopper_fp16_d64, DType::Float16, 64, 128, kHopper)        \
  X(rf_attention_forward_hopper_fp16_d80, DType::Float16, 80, 128, kHopper)        \
  X(rf_attention_forward_hopper_fp16_d96, DType::Float16, 96, 128, kHopper)        \
  X(rf_attention_forward_hopper_fp16_d128, DType::Float16, 128, 128, kHopper)      \
  X(rf_attention_forward_hopper_fp16_d256, DType::Float16, 256, 64, kHopper)       \
  X(rf_attention_forward_hopper_bf16_d64, DType::BFloat16, 64, 128, kHopper)       \
  X(rf_attention_forward_hopper_bf16_d80, DType::BFloat16, 80, 128, kHopper)       \
  X(rf_attention_forward_hopper_bf16_d96, DType::BFloat16, 96, 128, kHopper)       \
  X(rf_attention_forward_hopper_bf16_d128, DType::BFloat16, 128, 128, kHopper)     \
  X(rf_attention_forward_hopper_bf16_d256, DType::BFloat16, 256, 64, kHopper)      \
  X(rf_attention_forward_fp16_d64, DType::Float16, 64, 64, kAll)                   \
  X(rf_attention_forward_fp16_d80, DType::Float16, 80, 64, kAll)                   \
  X(rf_attention_forward_fp16_d96, DType::Float16, 96, 64, kAll)                   \
  X(rf_attention_forward_fp16_d128_k32, DType::Float16, 128, 32, kSmall)           \
  X(rf_attention_forward_fp16_d128, DType::Float16, 128, 64, kAll)                 \
  X(rf_attention_forward_fp16_d256, DType::Float16, 256, 32, kAll)                 \
  X(rf_attention_forward_bf16_d64, DType::BFloat16, 64, 64, kAll)                  \
  X(rf_attention_forward_bf16_d80, DType::BFloat16, 80, 64, kAll)                  \
  X(rf_attention_forward_bf16_d96, DType::BFloat16, 96, 64, kAll)                  \
  X(rf_attention_forward_bf16_d128_k32, DType::BFloat16, 128, 32, kSmall)          \
  X(rf_attention_forward_bf16_d128, DType::BFloat16, 128, 64, kAll)                \
  X(rf_attention_forward_bf16_d256, DType::BFloat16, 256, 32, kAll)
#define RF_DECLARE_ROW(name, ...) RF_DECLARE_KERNEL(name)
RF_FORWARD_KERNELS(RF_DECLARE_ROW)
RF_DECLARE_KERNEL(rf_attention_merge_fp16)
RF_DECLARE_KERNEL(rf_attention_merge_bf16)

namespace rfkernels::cuda {
namespace {

constexpr int kSmallShared = 128 * 1024;  // sm_86, sm_89 and sm_120 have 100 KB, the others 164 KB and more

enum class For { kAll, kSmall /* multiprocessors with 100 KB of shared memory */, kHopper /* 9.0 */ };

struct ForwardKernel {
  Kernel kernel;
  DType dtype;
  ForwardTiles tiles;
  For device;

  bool runs_on(const Tensor& x) const {
    if (device == For::kHopper) return capability(x) == 90;
    return device == For::kAll || shared_memory(x) < kSmallShared;
  }
};

#define RF_ROW(name, dtype, head_dim, keys, device) \
  {RF_KERNEL(name), dtype, {head_dim, keys, For::device == For::kHopper}, For::device},
const ForwardKernel kForward[] = {RF_FORWARD_KERNELS(RF_ROW)};

const ForwardKernel& forward_kernel(const Tensor& k, int64_t head_dim) {
  const DType dtype = dtype_of(k);
  for (const ForwardKernel& row : kForward)
    if (row.dtype == dtype && row.tiles.head_dim == head_dim && row.runs_on(k) && available(row.kernel)) return row;
  STD_TORCH_CHECK(false, "no CUDA attention kernel was compiled in for this dtype and head_dim ", head_dim);
}

std::tuple<Tensor, Tensor> attention_forward(const requests::AttentionForward& request,
                                             const std::vector<Tensor>& tensors) {
  const auto& [q, keys, rope, scale] = request;
  const Tensor& k = keys.k;
  ForwardParams params{};
  params.problem = attention_problem(q, keys, rope, scale);
  const AttentionProblem& p = params.problem;
  const TensorView vq = view(q, k), vk = view(k, k), vok = view(keys.own_k, k);
  const ForwardKernel& kernel = forward_kernel(k, vk.head_dim);

  const Tensor out = torch::stable::new_empty(k, q.sizes());
  const Tensor lse = torch::stable::new_empty(k, {vq.batch, vq.heads, vq.tokens}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  params.row_blocks = int32_t(divide_up(vq.tokens, ForwardTiles::kRows));
  const int64_t row_tiles = params.row_blocks * vq.heads * vq.batch;
  const int64_t longest =
      p.use == Use::kWindow ? std::min(vk.tokens, p.mask.sink_tokens + p.mask.window_tokens) : vk.tokens + vok.tokens;
  const TilePlan plan = plan_tiles(row_tiles, longest, kernel.tiles.keys, processors(k), kernel.tiles.blocks_per_sm());
  const int64_t tail = row_tiles - plan.whole;
  params.whole = int32_t(plan.whole), params.shares = int32_t(plan.shares);
  params.out = out.mutable_data_ptr();
  params.lse = lse.mutable_data_ptr<float>();
  if (tail == 0) {
    launch(kernel.kernel, {row_tiles}, kernel.tiles.threads(), kernel.tiles.shared_bytes(), params, tensors,
           {out, lse});
    return {out, lse};
  }
  // The only memory beside the outputs.
  const Tensor part_lse = torch::stable::new_empty(k, {tail, plan.shares, ForwardTiles::kRows}, ScalarType::Float);
  const Tensor parts =
      torch::stable::new_empty(k, {tail, plan.shares, ForwardTiles::kRows, vq.head_dim}, ScalarType::Float);
  params.parts = parts.mutable_data_ptr<float>();
  params.part_lse = part_lse.mutable_data_ptr<float>();
  std::vector<Tensor> touched = tensors;
  touched.insert(touched.end(), {out, lse});
  launch(kernel.kernel, {plan.blocks(row_tiles)}, kernel.tiles.threads(), kernel.tiles.shared_bytes(), params, touched,
         {parts, part_lse});
  const MergeParams merge{params.parts,  params.part_lse,   params.out, params.lse, params.whole,
                          params.shares, params.row_blocks, p.queries,  p.heads,    int32_t(vq.head_dim)};
  const Kernel join =
      kernel.dtype == DType::Float16 ? RF_KERNEL(rf_attention_merge_fp16) : RF_KERNEL(rf_attention_merge_bf16);
  launch(join, {tail * ForwardTiles::kRows / kMergeRows}, 32 * kMergeRows, 0, merge, {parts, part_lse, out, lse});
  return {out, lse};
}

// Two launches, or three where some tiles' keys are shared: write, attend, merge. The normaliser comes with the result
// for nothing.
std::tuple<Tensor, Tensor> streaming_attention(const requests::StreamingAttention& request,
                                               const std::vector<Tensor>& tensors) {
  const auto& [q, into, scale, full, return_lse] = request;
  STD_TORCH_CHECK(q.dim() == 4 && into.new_k.dim() == 4 && q.size(1) == into.new_k.size(1),
                  "q must have the tokens of the new k");
  write(into, tensors);
  const CacheGeometry& geometry = into.geometry;
  const requests::Keys keys{into.cache.k,
                            into.cache.v,
                            {},
                            {},
                            into.num_frames,
                            geometry.frame_tokens,
                            geometry.sink_frames + geometry.window_frames,
                            {0, 1, 1, 1, true}};
  return attention_forward({q, keys, into.rope, scale}, tensors);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_NATIVE_NAMESPACE, RF_DISPATCH_KEY, m) {
  m.impl("streaming_attention", boxed<streaming_attention>);
}

STABLE_TORCH_LIBRARY_IMPL(RF_CUDA_NAMESPACE, RF_DISPATCH_KEY, m) {
  m.impl("attention_forward", boxed<attention_forward>);
}

}  // namespace rfkernels::cuda
