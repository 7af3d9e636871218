// Attention forward on CUDA: chooses a kernel and a number of splits, fills in the parameters, launches.
#include <algorithm>
#include <tuple>

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

constexpr int kMergeRows = 8, kMergeThreads = 256, kMaxSplits = 16;
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

// As many blocks as fill the device once share the keys of a tile of queries, each with two tiles of keys or more.
int64_t splits_of(int64_t blocks, int64_t keys, const ForwardTiles& tiles, const Tensor& x) {
  const int64_t resident = int64_t(processors(x)) * tiles.blocks_per_sm();
  return std::max<int64_t>(
      1, std::min({resident / std::max<int64_t>(1, blocks), keys / (2 * tiles.keys), int64_t(kMaxSplits)}));
}

std::tuple<Tensor, Tensor> attention_forward(Tensor q, Tensor k, Tensor v, OptionalTensor own_k, OptionalTensor own_v,
                                             OptionalTensor num_frames, int64_t frame_tokens, int64_t capacity,
                                             int64_t sink_tokens, int64_t window_tokens, int64_t chunk_tokens,
                                             int64_t first_chunk_tokens, bool own_chunk, OptionalTensor frame_turns,
                                             OptionalTensor spatial, bool half_split, double scale) {
  ForwardParams params{};
  params.problem =
      attention_problem(q, k, v, own_k, own_v, num_frames, frame_tokens, capacity, sink_tokens, window_tokens,
                        chunk_tokens, first_chunk_tokens, own_chunk, frame_turns, spatial, half_split, scale);
  const AttentionProblem& p = params.problem;
  const TensorView vq = view(q, k), vk = view(k, k), vok = view(own_k, k);
  const ForwardKernel& kernel = forward_kernel(k, vk.head_dim);

  const Tensor out = torch::stable::new_empty(k, q.sizes());
  const Tensor lse = torch::stable::new_empty(k, {vq.batch, vq.heads, vq.tokens}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  params.row_blocks = int32_t(divide_up(vq.tokens, ForwardTiles::kRows));
  const int64_t blocks = params.row_blocks * vq.heads * vq.batch;
  const int64_t longest =
      p.use == Use::kWindow ? std::min(vk.tokens, sink_tokens + window_tokens) : vk.tokens + vok.tokens;
  const int64_t splits = splits_of(blocks, longest, kernel.tiles, k);
  params.splits = int32_t(splits);
  // With splits each writes a result of its own, in float: the only memory beside the outputs.
  const Tensor parts = splits == 1 ? out
                                   : torch::stable::new_empty(k, {splits, vq.batch, vq.tokens, vq.heads, vq.head_dim},
                                                              ScalarType::Float);
  const Tensor part_lse =
      splits == 1 ? lse : torch::stable::new_empty(k, {splits, vq.batch, vq.heads, vq.tokens}, ScalarType::Float);
  params.out = parts.mutable_data_ptr();
  params.lse = part_lse.mutable_data_ptr<float>();
  launch(kernel.kernel, {blocks, splits}, kernel.tiles.threads(), kernel.tiles.shared_bytes(), params,
         present({q, k, v, own_k, own_v, num_frames, frame_turns, spatial}), {parts, part_lse});
  if (splits > 1) {
    const MergeParams merge{parts.const_data_ptr<float>(),
                            part_lse.const_data_ptr<float>(),
                            out.mutable_data_ptr(),
                            lse.mutable_data_ptr<float>(),
                            params.splits,
                            p.batch,
                            p.queries,
                            p.heads,
                            int32_t(vq.head_dim)};
    const Kernel join =
        kernel.dtype == DType::Float16 ? RF_KERNEL(rf_attention_merge_fp16) : RF_KERNEL(rf_attention_merge_bf16);
    launch(join, {divide_up(vq.batch * vq.tokens * vq.heads, kMergeRows)}, kMergeThreads, 0, merge, {parts, part_lse},
           {out, lse});
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_NAMESPACE, RF_DISPATCH_KEY, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
}

}  // namespace rfkernels::cuda
