// The CPU kernels as torch operators.
#include <array>
#include <tuple>
#include <utility>
#include <vector>

#include "../cpu/kernels.h"
#include "arguments.h"

namespace rfkernels {
namespace {

void begin_chunk(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames,
                 int64_t new_frames, OptionalTensor advancing, OptionalTensor decay, OptionalTensor frame_turns,
                 OptionalTensor spatial, bool half_split, int64_t sink_frames, int64_t window_frames,
                 int64_t frame_tokens, bool before_window) {
  cpu::begin_chunk(begin_chunk_arguments(k, v, sink_k, sink_v, num_frames, new_frames, advancing, decay, frame_turns,
                                         spatial, half_split, sink_frames, window_frames, frame_tokens, before_window));
}

void write(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames, Tensor new_k,
           Tensor new_v, OptionalTensor frame_turns, OptionalTensor spatial, bool half_split, int64_t sink_frames,
           int64_t window_frames, int64_t frame_tokens) {
  cpu::write(write_arguments(k, v, sink_k, sink_v, num_frames, new_k, new_v, frame_turns, spatial, half_split,
                             sink_frames, window_frames, frame_tokens));
}

Tensor rotate(Tensor x, Tensor frames, int64_t first_token, int64_t frame_tokens, Tensor frame_turns, Tensor spatial,
              bool half_split, bool inverse, ScalarType dtype) {
  const Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  cpu::rotate(rotate_arguments(out, x, frames, first_token, frame_tokens, frame_turns, spatial, half_split, inverse));
  return out;
}

// torch's flash attention for CPUs, q [B, H, N, D] over k, v [B, H, M, D] of any strides; out gets q's layout.
std::pair<Tensor, Tensor> flash(const Tensor& q, const Tensor& k, const Tensor& v, double scale) {
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack{
      from(q), from(k), from(v), from(0.0), from(false), from(OptionalTensor()), from(std::optional<double>(scale))};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::_scaled_dot_product_flash_attention_for_cpu", "", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

// Writes the chunk's K and V, then attends over the valid prefix of the layer: one call where a Python path would make
// a dozen, which counts on small frames. Serves streams of one age that have every open frame, without grouped heads;
// the backend composes the rest.
std::tuple<Tensor, Tensor> streaming_attention(Tensor q, Tensor new_k, Tensor new_v, Tensor k, Tensor v,
                                               OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames,
                                               OptionalTensor frame_turns, OptionalTensor spatial, bool half_split,
                                               int64_t sink_frames, int64_t window_frames, int64_t frame_tokens,
                                               double scale) {
  const CacheGeometry geometry{sink_frames, window_frames, frame_tokens};
  const int64_t batch = q.size(0), open = q.size(1) / frame_tokens;
  const int64_t* ages = frame_counts(num_frames, batch, q);
  STD_TORCH_CHECK(q.dim() == 4 && q.size(2) == k.size(2) && ages[0] >= open, "grouped heads or a missing frame");
  std::vector<int64_t> frames;
  for (int64_t sample = 0; sample < batch; ++sample) {
    STD_TORCH_CHECK(ages[sample] == ages[0], "streams of different ages");
    for (int64_t f = 0; f < open; ++f) frames.push_back(ages[sample] - open + f);
  }
  write(k, v, sink_k, sink_v, num_frames, new_k, new_v, frame_turns, spatial, half_split, sink_frames, window_frames,
        frame_tokens);
  const int64_t tokens = geometry.valid_frames(ages[0]) * frame_tokens;
  const auto prefix = [&](Tensor x) { return torch::stable::transpose(torch::stable::narrow(x, 1, 0, tokens), 1, 2); };
  // torch's kernel is a few percent faster on half types where queries, too, lie head by head: worth a copy of the
  // result.
  const bool by_head = is_half(dtype_of(k));
  const auto swap = [](const Tensor& x) { return torch::stable::transpose(x, 1, 2); };
  const int64_t tokens_q = q.size(1), heads = q.size(2), head_dim = q.size(3);
  Tensor queries = by_head ? swap(torch::stable::new_empty(q, {batch, heads, tokens_q, head_dim}, k.scalar_type()))
                           : torch::stable::new_empty(q, q.sizes(), k.scalar_type());
  if (frame_turns)
    cpu::rotate(rotate_arguments(queries, q, frames.data(), open, open, 0, frame_tokens, *frame_turns, *spatial,
                                 half_split, false));
  else
    torch::stable::copy_(queries, q);
  auto [out, lse] = flash(swap(queries), prefix(k), prefix(v), scale);
  return {torch::stable::contiguous(swap(out)), torch::stable::contiguous(lse)};
}

std::tuple<Tensor, Tensor> redmd_loss(Tensor x, Tensor fake, Tensor real_cond, OptionalTensor real_uncond,
                                      OptionalTensor fake_uncond, Tensor weight, OptionalTensor mask,
                                      double guidance_scale, double fake_guidance_scale, bool need_grad) {
  ReDMDLoss args =
      redmd_arguments(x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale);
  Tensor grad = need_grad ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  args.grad = need_grad ? static_cast<char*>(grad.mutable_data_ptr()) : nullptr;
  Tensor loss = torch::stable::new_empty(weight, {});
  args.loss = loss.mutable_data_ptr();
  cpu::redmd_loss(args);
  return {loss, grad};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rfkernels_native, CPU, m) {
  m.impl("begin_chunk", TORCH_BOX(&begin_chunk));
  m.impl("write", TORCH_BOX(&write));
  m.impl("rotate", TORCH_BOX(&rotate));
  m.impl("streaming_attention", TORCH_BOX(&streaming_attention));
  m.impl("redmd_loss", TORCH_BOX(&redmd_loss));
}

}  // namespace rfkernels
