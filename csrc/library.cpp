// The CPU kernels as torch operators. Schemas are defined in Python (rfkernels/ops.py), which also checks arguments
// for people; what is checked here would otherwise read or write out of bounds.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace rfkernels {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

cpu::DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return cpu::DType::Float16;
    case ScalarType::BFloat16:
      return cpu::DType::BFloat16;
    case ScalarType::Float:
      return cpu::DType::Float32;
    case ScalarType::Double:
      return cpu::DType::Float64;
    default:
      STD_TORCH_CHECK(false, "expected float16, bfloat16, float32 or float64");
  }
}

// [B, tokens, heads, D], or [L, B, tokens, heads, D] for the whole cache.
cpu::TensorView view(const Tensor& x) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d == 4 || d == 5, "expected a tensor of rank 4 or 5, got ", d);
  STD_TORCH_CHECK(x.is_cpu(), "expected a CPU tensor");
  STD_TORCH_CHECK(x.size(d - 1) <= 1 || x.stride(d - 1) == 1, "the last dimension must be contiguous");
  cpu::TensorView v;
  v.dtype = dtype_of(x);
  const int64_t item = cpu::item_size(v.dtype);
  v.data = static_cast<char*>(x.data_ptr());
  v.layers = d == 5 ? x.size(0) : 1;
  v.layer_stride = d == 5 ? x.stride(0) * item : 0;
  v.batch = x.size(d - 4), v.batch_stride = x.stride(d - 4) * item;
  v.tokens = x.size(d - 3), v.token_stride = x.stride(d - 3) * item;
  v.heads = x.size(d - 2), v.head_stride = x.stride(d - 2) * item;
  v.head_dim = x.size(d - 1);
  return v;
}
cpu::TensorView view(const OptionalTensor& x) { return x ? view(*x) : cpu::TensorView{}; }

cpu::RopeView rope_view(const OptionalTensor& frame_turns, const OptionalTensor& spatial, bool half_split,
                        int64_t frame_tokens, int64_t head_dim, cpu::DType accumulator) {
  cpu::RopeView rope;
  if (!frame_turns) return rope;
  STD_TORCH_CHECK(spatial.has_value(), "frame_turns and spatial come together");
  STD_TORCH_CHECK(frame_turns->is_contiguous() && frame_turns->scalar_type() == ScalarType::Double,
                  "frame_turns must be contiguous float64");
  STD_TORCH_CHECK(spatial->is_contiguous() && dtype_of(*spatial) == accumulator && spatial->dim() == 3 &&
                      spatial->size(0) == frame_tokens && spatial->size(2) == 2,
                  "spatial must be contiguous [frame_tokens, pairs, 2] in the accumulators' dtype");
  rope.present = true;
  rope.frame_turns = frame_turns->const_data_ptr<double>();
  rope.frame_pairs = frame_turns->numel();
  rope.spatial = spatial->const_data_ptr();
  rope.spatial_pairs = spatial->size(1);
  rope.half_split = half_split;
  STD_TORCH_CHECK(2 * (rope.frame_pairs + rope.spatial_pairs) == head_dim, "rope pairs must cover head_dim");
  return rope;
}

cpu::DType accumulator_of(cpu::DType dtype) {
  return dtype == cpu::DType::Float64 ? cpu::DType::Float64 : cpu::DType::Float32;
}

const int64_t* frame_counts(const Tensor& num_frames, int64_t batch) {
  STD_TORCH_CHECK(
      num_frames.scalar_type() == ScalarType::Long && num_frames.is_contiguous() && num_frames.numel() == batch,
      "num_frames must be contiguous int64 [batch]");
  return num_frames.const_data_ptr<int64_t>();
}

cpu::Cache cache_view(const Tensor& k, const Tensor& v, const OptionalTensor& sink_k, const OptionalTensor& sink_v,
                      const OptionalTensor& frame_turns, const OptionalTensor& spatial, bool half_split,
                      int64_t sink_frames, int64_t window_frames, int64_t frame_tokens) {
  cpu::Cache cache{view(k), view(v), view(sink_k), view(sink_v), {sink_frames, window_frames, frame_tokens}, {}};
  STD_TORCH_CHECK(sink_frames >= 0 && window_frames >= 1 && frame_tokens >= 1, "impossible cache geometry");
  const auto covers = [&](const cpu::TensorView& x, int64_t frames) {
    return !x || (x.layers == cache.k.layers && x.batch == cache.k.batch && x.heads == cache.k.heads &&
                  x.head_dim == cache.k.head_dim && x.tokens >= frames * frame_tokens);
  };
  const int64_t frames = sink_frames + window_frames;
  STD_TORCH_CHECK(covers(cache.k, frames) && covers(cache.v, frames) && covers(cache.sink_k, sink_frames) &&
                      covers(cache.sink_v, sink_frames),
                  "cache tensors do not match each other or the geometry");
  cache.rope =
      rope_view(frame_turns, spatial, half_split, frame_tokens, cache.k.head_dim, accumulator_of(cache.k.dtype));
  return cache;
}

void begin_chunk(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames,
                 int64_t new_frames, OptionalTensor advancing, OptionalTensor decay, OptionalTensor frame_turns,
                 OptionalTensor spatial, bool half_split, int64_t sink_frames, int64_t window_frames,
                 int64_t frame_tokens, bool before_window) {
  cpu::BeginChunk args{};
  args.cache =
      cache_view(k, v, sink_k, sink_v, frame_turns, spatial, half_split, sink_frames, window_frames, frame_tokens);
  STD_TORCH_CHECK(new_frames >= 0 && new_frames <= window_frames, "new_frames must be in 0..window_frames");
  args.num_frames = frame_counts(num_frames, args.cache.k.batch);
  args.new_frames = new_frames;
  args.before_window = before_window;
  if (advancing) {
    STD_TORCH_CHECK(advancing->scalar_type() == ScalarType::Bool && advancing->is_contiguous() &&
                        advancing->numel() == args.cache.k.batch,
                    "advancing must be contiguous bool [batch]");
    args.advancing = advancing->const_data_ptr<bool>();
  }
  if (decay) {
    STD_TORCH_CHECK(dtype_of(*decay) == accumulator_of(args.cache.k.dtype) && decay->is_contiguous() &&
                        decay->numel() == 2 * args.cache.k.heads,
                    "decay must be contiguous [2, heads] in the accumulators' dtype");
    args.decay = decay->const_data_ptr();
  }
  cpu::begin_chunk(args);
}

void write(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames, Tensor new_k,
           Tensor new_v, OptionalTensor frame_turns, OptionalTensor spatial, bool half_split, int64_t sink_frames,
           int64_t window_frames, int64_t frame_tokens) {
  cpu::Write args{};
  args.cache =
      cache_view(k, v, sink_k, sink_v, frame_turns, spatial, half_split, sink_frames, window_frames, frame_tokens);
  args.new_k = view(new_k);
  args.new_v = view(new_v);
  const auto matches = [&](const cpu::TensorView& x) {
    return x.layers == 1 && x.batch == args.cache.k.batch && x.heads == args.cache.k.heads &&
           x.head_dim == args.cache.k.head_dim && x.tokens == args.new_k.tokens;
  };
  STD_TORCH_CHECK(args.cache.k.layers == 1 && matches(args.new_k) && matches(args.new_v),
                  "new k and v must be [batch, tokens, heads, head_dim] of the cache");
  STD_TORCH_CHECK(args.new_k.tokens % frame_tokens == 0 && args.new_k.tokens <= window_frames * frame_tokens,
                  "new k and v must hold whole frames, at most window_frames");
  args.num_frames = frame_counts(num_frames, args.cache.k.batch);
  cpu::write(args);
}

// x [B, N, H, D] rotated at frame numbers frames[b * batch_stride + n / (tokens / entries)], written to out (a view of
// x's shape, any strides).
void rotate_into(const Tensor& out, const Tensor& x, const int64_t* frames, int64_t batch_stride, int64_t entries,
                 int64_t first_token, int64_t frame_tokens, const Tensor& frame_turns, const Tensor& spatial,
                 bool half_split, bool inverse) {
  cpu::Rotate args{};
  args.x = view(x);
  args.out = view(out);
  args.frames = frames;
  args.frames_batch_stride = batch_stride;
  args.entries = entries;
  args.first_token = first_token;
  args.frame_tokens = frame_tokens;
  args.inverse = inverse;
  args.precision = dtype_of(spatial);
  args.rope =
      rope_view(frame_turns, spatial, half_split, frame_tokens, args.x.head_dim, accumulator_of(args.precision));
  cpu::rotate(args);
}

Tensor rotate(Tensor x, Tensor frames, int64_t first_token, int64_t frame_tokens, Tensor frame_turns, Tensor spatial,
              bool half_split, bool inverse, ScalarType dtype) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have rank 4");
  STD_TORCH_CHECK(frames.scalar_type() == ScalarType::Long && frames.is_contiguous() && frames.dim() == 2 &&
                      (frames.size(0) == 1 || frames.size(0) == x.size(0)) && frames.size(1) > 0 &&
                      x.size(1) % frames.size(1) == 0,
                  "frames must be contiguous int64 [batch or 1, entries] with entries dividing the tokens");
  STD_TORCH_CHECK(first_token >= 0 && frame_tokens >= 1, "first_token and frame_tokens must not be negative");
  const Tensor out = torch::stable::new_empty(x, x.sizes(), dtype);
  rotate_into(out, x, frames.const_data_ptr<int64_t>(), frames.size(0) == 1 ? 0 : frames.size(1), frames.size(1),
              first_token, frame_tokens, frame_turns, spatial, half_split, inverse);
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
  const int64_t* ages = frame_counts(num_frames, batch);
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
  const bool by_head = cpu::is_half(dtype_of(k));
  const auto swap = [](const Tensor& x) { return torch::stable::transpose(x, 1, 2); };
  const int64_t tokens_q = q.size(1), heads = q.size(2), head_dim = q.size(3);
  Tensor queries = by_head ? swap(torch::stable::new_empty(q, {batch, heads, tokens_q, head_dim}, k.scalar_type()))
                           : torch::stable::new_empty(q, q.sizes(), k.scalar_type());
  if (frame_turns)
    rotate_into(queries, q, frames.data(), open, open, 0, frame_tokens, *frame_turns, *spatial, half_split, false);
  else
    torch::stable::copy_(queries, q);
  auto [out, lse] = flash(swap(queries), prefix(k), prefix(v), scale);
  return {torch::stable::contiguous(swap(out)), torch::stable::contiguous(lse)};
}

std::tuple<Tensor, Tensor> redmd_loss(Tensor x, Tensor fake, Tensor real_cond, OptionalTensor real_uncond,
                                      OptionalTensor fake_uncond, Tensor weight, OptionalTensor mask,
                                      double guidance_scale, double fake_guidance_scale, bool need_grad) {
  const auto latent = [&](const Tensor& t) {
    STD_TORCH_CHECK(t.is_cpu() && t.is_contiguous() && t.numel() == x.numel(),
                    "latents must be contiguous CPU tensors of one shape");
    return cpu::LatentView{static_cast<const char*>(t.const_data_ptr()), dtype_of(t)};
  };
  cpu::ReDMDLoss args{};
  args.x = latent(x);
  args.fake = latent(fake);
  args.real_cond = latent(real_cond);
  if (real_uncond) args.real_uncond = latent(*real_uncond);
  if (fake_uncond) args.fake_uncond = latent(*fake_uncond);
  args.batch = x.size(0);
  args.elements = args.batch == 0 ? 0 : x.numel() / args.batch;
  const cpu::DType accumulator = accumulator_of(args.x.dtype);
  STD_TORCH_CHECK(dtype_of(weight) == accumulator && weight.is_contiguous() && weight.numel() == args.batch,
                  "weight must be contiguous [batch] in float32 (float64 for a float64 x)");
  args.weight = weight.const_data_ptr();
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == x.numel(),
                    "mask must be contiguous bool of x's shape");
    args.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  args.guidance_scale = guidance_scale;
  args.fake_guidance_scale = fake_guidance_scale;
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
