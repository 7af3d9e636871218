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
namespace {

void begin_chunk(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames,
                 int64_t new_frames, OptionalTensor advancing, OptionalTensor decay, OptionalTensor frame_turns,
                 OptionalTensor spatial, bool half_split, int64_t sink_frames, int64_t window_frames,
                 int64_t frame_tokens, bool before_window) {
  const BeginChunk args =
      begin_chunk_arguments(k, v, sink_k, sink_v, num_frames, new_frames, advancing, decay, frame_turns, spatial,
                            half_split, sink_frames, window_frames, frame_tokens, before_window);
  const TensorView& x = args.cache.k;
  check_served(k, x.head_dim);
  launch(RF_KERNEL(rf_begin_chunk),
         {token_blocks(frame_tokens, x.head_dim) * sink_frames * x.heads * x.batch * x.layers}, kThreads, 0, args,
         present({k, v, sink_k, sink_v, num_frames, advancing, decay, frame_turns, spatial}));
}

void write(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames, Tensor new_k,
           Tensor new_v, OptionalTensor frame_turns, OptionalTensor spatial, bool half_split, int64_t sink_frames,
           int64_t window_frames, int64_t frame_tokens) {
  const Write args = write_arguments(k, v, sink_k, sink_v, num_frames, new_k, new_v, frame_turns, spatial, half_split,
                                     sink_frames, window_frames, frame_tokens);
  const TensorView& x = args.new_k;
  check_served(k, x.head_dim);
  launch(RF_KERNEL(rf_write),
         {token_blocks(frame_tokens, x.head_dim) * head_groups(x.heads) * (x.tokens / frame_tokens) * x.batch},
         kThreads, 0, args, present({k, v, sink_k, sink_v, num_frames, new_k, new_v, frame_turns, spatial}));
}

Tensor rotate(Tensor x, Tensor frames, int64_t first_token, int64_t frame_tokens, Tensor frame_turns, Tensor spatial,
              bool half_split, bool inverse, ScalarType dtype) {
  const Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  const Rotate args =
      rotate_arguments(out, x, frames, first_token, frame_tokens, frame_turns, spatial, half_split, inverse);
  check_served(out, args.x.head_dim);
  STD_TORCH_CHECK(args.precision == DType::Float32, "spatial must be float32");
  launch(RF_KERNEL(rf_rotate),
         {token_blocks(args.x.tokens, args.x.head_dim) * head_groups(args.x.heads) * args.x.batch}, kThreads, 0, args,
         {x, frames, frame_turns, spatial}, {out});
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
std::tuple<Tensor, Tensor> redmd_loss(Tensor x, Tensor fake, Tensor real_cond, OptionalTensor real_uncond,
                                      OptionalTensor fake_uncond, Tensor weight, OptionalTensor mask,
                                      double guidance_scale, double fake_guidance_scale, bool need_grad) {
  ReDMD args{};
  args.loss =
      redmd_arguments(x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale);
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
  launch(RF_KERNEL(rf_redmd_norm), {batch * args.parts}, kLossThreads, 0, args,
         present({x, real_cond, real_uncond, mask}), {norms, counts});
  std::vector<Tensor> results{squares};
  if (need_grad) results.push_back(grad);
  launch(RF_KERNEL(rf_redmd_grad), {batch * args.parts}, kLossThreads, 0, args,
         present({fake, real_cond, real_uncond, fake_uncond, weight, mask, norms, counts}), results);
  launch(RF_KERNEL(rf_redmd_sum), {1}, kLossThreads, 0, args, {squares}, {loss});
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(RF_NAMESPACE, RF_DISPATCH_KEY, m) {
  m.impl("begin_chunk", TORCH_BOX(&begin_chunk));
  m.impl("write", TORCH_BOX(&write));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("redmd_loss", TORCH_BOX(&redmd_loss));
}

}  // namespace rfkernels::cuda
