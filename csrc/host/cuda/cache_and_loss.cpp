// The CUDA kernels as torch operators: fills in the kernels' arguments and launches. Nothing here waits for the device
// or reads from it, so that a CUDA graph can hold every call.
#include <tuple>

#include "../../cuda/cache/tiles.h"
#include "../../cuda/loss/tiles.h"
#include "launch.h"

RF_DECLARE_KERNEL(rf_begin_chunk)
RF_DECLARE_KERNEL(rf_write)
RF_DECLARE_KERNEL(rf_rotate)
RF_DECLARE_KERNEL(rf_redmd_norm)
RF_DECLARE_KERNEL(rf_redmd_grad)
RF_DECLARE_KERNEL(rf_redmd_sum)

namespace rfkernels::cuda {

void write(const requests::Write& request, const std::vector<Tensor>& tensors) {
  const Write args = arguments_of(request);
  const TensorView& x = args.new_k;
  const int64_t frame_tokens = args.cache.geometry.frame_tokens;
  check_served(request.cache.k, x.head_dim);
  launch(RF_KERNEL(rf_write),
         {token_blocks(frame_tokens, x.head_dim) * head_groups(x.heads) * (x.tokens / frame_tokens) * x.batch},
         kThreads, 0, args, tensors);
}

namespace {

void begin_chunk(const requests::BeginChunk& request, const std::vector<Tensor>& tensors) {
  const BeginChunk args = arguments_of(request);
  const TensorView& x = args.cache.k;
  const CacheGeometry& geometry = args.cache.geometry;
  check_served(request.cache.k, x.head_dim);
  launch(RF_KERNEL(rf_begin_chunk),
         {token_blocks(geometry.frame_tokens, x.head_dim) * geometry.sink_frames * x.heads * x.batch * x.layers},
         kThreads, 0, args, tensors);
}

Tensor rotate(const requests::Rotate& request, const std::vector<Tensor>& tensors) {
  const Tensor out = torch::stable::new_empty(request.x, request.x.sizes(), request.dtype);
  const Rotate args = arguments_of(request, out);
  check_served(out, args.x.head_dim);
  STD_TORCH_CHECK(args.precision == DType::Float32, "spatial must be float32");
  launch(RF_KERNEL(rf_rotate),
         {token_blocks(args.x.tokens, args.x.head_dim) * head_groups(args.x.heads) * args.x.batch}, kThreads, 0, args,
         tensors, {out});
  return out;
}

// Vectors of eight elements begin at multiples of 16 bytes, in every sample.
bool aligned(const ReDMD& args) {
  const auto at = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  const ReDMDLoss& a = args.loss;
  return a.elements % kLossVector == 0 && at(a.x.data, 16) && at(a.fake.data, 16) && at(a.real_cond.data, 16) &&
         at(a.real_uncond.data, 16) && at(a.fake_uncond.data, 16) && at(a.grad, 16) && at(a.mask, 8);
}

// Beside the outputs a few KB for the sums of the blocks: between two passes they must be somewhere.
std::tuple<Tensor, Tensor> redmd_loss(const requests::ReDMD& request, const std::vector<Tensor>& given) {
  const auto& [x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance, fake_guidance, need_grad] =
      request;
  ReDMD args{};
  args.loss = arguments_of(request);
  check_served(x, kColumns);
  const int64_t batch = args.loss.batch, elements = args.loss.elements;
  Tensor grad = need_grad ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  if (x.numel() == 0) return {torch::stable::new_zeros(weight, {}), grad};
  Tensor loss = torch::stable::new_empty(weight, {});
  args.span = divide_up(divide_up(elements, kMaxParts), kLossTile) * kLossTile;
  args.parts = divide_up(elements, args.span);
  Tensor norms = torch::stable::new_empty(weight, {batch, args.parts}, ScalarType::Double);
  Tensor squares = torch::stable::new_empty(weight, {batch, args.parts}, ScalarType::Double);
  Tensor counts = torch::stable::new_empty(weight, {batch, args.parts}, ScalarType::Int);
  args.norms = norms.mutable_data_ptr<double>();
  args.squares = squares.mutable_data_ptr<double>();
  args.counts = counts.mutable_data_ptr<int32_t>();
  args.loss.grad = need_grad ? static_cast<char*>(grad.mutable_data_ptr()) : nullptr;
  args.loss.loss = loss.mutable_data_ptr();
  args.aligned = aligned(args);
  launch(RF_KERNEL(rf_redmd_norm), {batch * args.parts}, kLossThreads, 0, args, given, {norms, counts});
  std::vector<Tensor> read = given, results{squares};
  read.insert(read.end(), {norms, counts});
  if (need_grad) results.push_back(grad);
  launch(RF_KERNEL(rf_redmd_grad), {batch * args.parts}, kLossThreads, 0, args, read, results);
  launch(RF_KERNEL(rf_redmd_sum), {1}, kLossThreads, 0, args, {squares}, {loss});
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_NATIVE_NAMESPACE, RF_DISPATCH_KEY, m) {
  m.impl("begin_chunk", boxed<begin_chunk>);
  m.impl("write", boxed<write>);
  m.impl("rotate", boxed<rotate>);
  m.impl("redmd_loss", boxed<redmd_loss>);
}

}  // namespace rfkernels::cuda
