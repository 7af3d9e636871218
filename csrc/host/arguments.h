// From tensors to the plain structs of kernels.h, for every device. Schemas are defined in Python (rfkernels/ops.py),
// which also checks arguments for people; what is checked here would otherwise read or write out of bounds.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../kernels.h"

namespace rfkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return DType::Float16;
    case ScalarType::BFloat16:
      return DType::BFloat16;
    case ScalarType::Float:
      return DType::Float32;
    case ScalarType::Double:
      return DType::Float64;
    default:
      STD_TORCH_CHECK(false, "expected float16, bfloat16, float32 or float64");
  }
}

inline DType accumulator_of(DType dtype) { return dtype == DType::Float64 ? DType::Float64 : DType::Float32; }

inline void check_same_device(const Tensor& x, const Tensor& other) {
  STD_TORCH_CHECK(x.is_cpu() == other.is_cpu() && x.get_device_index() == other.get_device_index(),
                  "all tensors must be on one device");
}

// [B, tokens, heads, D], or [L, B, tokens, heads, D] for the whole cache; on the device of `other`.
inline TensorView view(const Tensor& x, const Tensor& other) {
  const int64_t d = x.dim();
  STD_TORCH_CHECK(d == 4 || d == 5, "expected a tensor of rank 4 or 5, got ", d);
  STD_TORCH_CHECK(x.size(d - 1) <= 1 || x.stride(d - 1) == 1, "the last dimension must be contiguous");
  check_same_device(x, other);
  TensorView v;
  v.dtype = dtype_of(x);
  const int64_t item = item_size(v.dtype);
  v.data = static_cast<char*>(x.data_ptr());
  v.layers = d == 5 ? x.size(0) : 1;
  v.layer_stride = d == 5 ? x.stride(0) * item : 0;
  v.batch = x.size(d - 4), v.batch_stride = x.stride(d - 4) * item;
  v.tokens = x.size(d - 3), v.token_stride = x.stride(d - 3) * item;
  v.heads = x.size(d - 2), v.head_stride = x.stride(d - 2) * item;
  v.head_dim = x.size(d - 1);
  const auto whole = [](int64_t size, int64_t stride) { return size <= 1 || stride % 16 == 0; };
  v.aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0 && whole(v.layers, v.layer_stride) &&
              whole(v.batch, v.batch_stride) && whole(v.tokens, v.token_stride) && whole(v.heads, v.head_stride);
  return v;
}
inline TensorView view(const OptionalTensor& x, const Tensor& other) { return x ? view(*x, other) : TensorView{}; }

inline RopeView rope_view(const OptionalTensor& frame_turns, const OptionalTensor& spatial, bool half_split,
                          int64_t frame_tokens, int64_t head_dim, DType accumulator) {
  RopeView rope;
  if (!frame_turns) return rope;
  STD_TORCH_CHECK(spatial.has_value(), "frame_turns and spatial come together");
  check_same_device(*spatial, *frame_turns);
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

inline const int64_t* frame_counts(const Tensor& num_frames, int64_t batch, const Tensor& other) {
  check_same_device(num_frames, other);
  STD_TORCH_CHECK(
      num_frames.scalar_type() == ScalarType::Long && num_frames.is_contiguous() && num_frames.numel() == batch,
      "num_frames must be contiguous int64 [batch]");
  return num_frames.const_data_ptr<int64_t>();
}

inline Cache cache_view(const Tensor& k, const Tensor& v, const OptionalTensor& sink_k, const OptionalTensor& sink_v,
                        const OptionalTensor& frame_turns, const OptionalTensor& spatial, bool half_split,
                        int64_t sink_frames, int64_t window_frames, int64_t frame_tokens) {
  Cache cache{view(k, k), view(v, k), view(sink_k, k), view(sink_v, k), {sink_frames, window_frames, frame_tokens}, {}};
  STD_TORCH_CHECK(sink_frames >= 0 && window_frames >= 1 && frame_tokens >= 1, "impossible cache geometry");
  const auto covers = [&](const TensorView& x, int64_t frames) {
    return !x || (x.layers == cache.k.layers && x.batch == cache.k.batch && x.heads == cache.k.heads &&
                  x.head_dim == cache.k.head_dim && x.tokens >= frames * frame_tokens);
  };
  const int64_t frames = sink_frames + window_frames;
  STD_TORCH_CHECK(covers(cache.k, frames) && covers(cache.v, frames) && covers(cache.sink_k, sink_frames) &&
                      covers(cache.sink_v, sink_frames),
                  "cache tensors do not match each other or the geometry");
  if (frame_turns) check_same_device(*frame_turns, k);
  cache.rope =
      rope_view(frame_turns, spatial, half_split, frame_tokens, cache.k.head_dim, accumulator_of(cache.k.dtype));
  return cache;
}

inline BeginChunk begin_chunk_arguments(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v,
                                        Tensor num_frames, int64_t new_frames, OptionalTensor advancing,
                                        OptionalTensor decay, OptionalTensor frame_turns, OptionalTensor spatial,
                                        bool half_split, int64_t sink_frames, int64_t window_frames,
                                        int64_t frame_tokens, bool before_window) {
  BeginChunk args{};
  args.cache =
      cache_view(k, v, sink_k, sink_v, frame_turns, spatial, half_split, sink_frames, window_frames, frame_tokens);
  STD_TORCH_CHECK(new_frames >= 0 && new_frames <= window_frames, "new_frames must be in 0..window_frames");
  args.num_frames = frame_counts(num_frames, args.cache.k.batch, k);
  args.new_frames = new_frames;
  args.before_window = before_window;
  if (advancing) {
    check_same_device(*advancing, k);
    STD_TORCH_CHECK(advancing->scalar_type() == ScalarType::Bool && advancing->is_contiguous() &&
                        advancing->numel() == args.cache.k.batch,
                    "advancing must be contiguous bool [batch]");
    args.advancing = advancing->const_data_ptr<bool>();
  }
  if (decay) {
    check_same_device(*decay, k);
    STD_TORCH_CHECK(dtype_of(*decay) == accumulator_of(args.cache.k.dtype) && decay->is_contiguous() &&
                        decay->numel() == 2 * args.cache.k.heads,
                    "decay must be contiguous [2, heads] in the accumulators' dtype");
    args.decay = decay->const_data_ptr();
  }
  return args;
}

inline Write write_arguments(Tensor k, Tensor v, OptionalTensor sink_k, OptionalTensor sink_v, Tensor num_frames,
                             Tensor new_k, Tensor new_v, OptionalTensor frame_turns, OptionalTensor spatial,
                             bool half_split, int64_t sink_frames, int64_t window_frames, int64_t frame_tokens) {
  Write args{};
  args.cache =
      cache_view(k, v, sink_k, sink_v, frame_turns, spatial, half_split, sink_frames, window_frames, frame_tokens);
  args.new_k = view(new_k, k);
  args.new_v = view(new_v, k);
  const auto matches = [&](const TensorView& x) {
    return x.layers == 1 && x.batch == args.cache.k.batch && x.heads == args.cache.k.heads &&
           x.head_dim == args.cache.k.head_dim && x.tokens == args.new_k.tokens;
  };
  STD_TORCH_CHECK(args.cache.k.layers == 1 && matches(args.new_k) && matches(args.new_v),
                  "new k and v must be [batch, tokens, heads, head_dim] of the cache");
  STD_TORCH_CHECK(args.new_k.tokens % frame_tokens == 0 && args.new_k.tokens <= window_frames * frame_tokens,
                  "new k and v must hold whole frames, at most window_frames");
  args.num_frames = frame_counts(num_frames, args.cache.k.batch, k);
  return args;
}

// x [B, N, H, D] rotated at frame numbers frames[b * batch_stride + n / (tokens / entries)], written to out (a view of
// x's shape, any strides).
inline Rotate rotate_arguments(const Tensor& out, const Tensor& x, const int64_t* frames, int64_t batch_stride,
                               int64_t entries, int64_t first_token, int64_t frame_tokens, const Tensor& frame_turns,
                               const Tensor& spatial, bool half_split, bool inverse) {
  Rotate args{};
  args.x = view(x, x);
  args.out = view(out, x);
  args.frames = frames;
  args.frames_batch_stride = batch_stride;
  args.entries = entries;
  args.first_token = first_token;
  args.frame_tokens = frame_tokens;
  args.inverse = inverse;
  args.precision = dtype_of(spatial);
  args.rope =
      rope_view(frame_turns, spatial, half_split, frame_tokens, args.x.head_dim, accumulator_of(args.precision));
  return args;
}

inline Rotate rotate_arguments(const Tensor& out, const Tensor& x, const Tensor& frames, int64_t first_token,
                               int64_t frame_tokens, const Tensor& frame_turns, const Tensor& spatial, bool half_split,
                               bool inverse) {
  STD_TORCH_CHECK(x.dim() == 4, "x must have rank 4");
  check_same_device(frames, x);
  check_same_device(frame_turns, x);
  STD_TORCH_CHECK(frames.scalar_type() == ScalarType::Long && frames.is_contiguous() && frames.dim() == 2 &&
                      (frames.size(0) == 1 || frames.size(0) == x.size(0)) && frames.size(1) > 0 &&
                      x.size(1) % frames.size(1) == 0,
                  "frames must be contiguous int64 [batch or 1, entries] with entries dividing the tokens");
  STD_TORCH_CHECK(first_token >= 0 && frame_tokens >= 1, "first_token and frame_tokens must not be negative");
  return rotate_arguments(out, x, frames.const_data_ptr<int64_t>(), frames.size(0) == 1 ? 0 : frames.size(1),
                          frames.size(1), first_token, frame_tokens, frame_turns, spatial, half_split, inverse);
}

// The outputs, grad and loss, are left to the caller.
inline ReDMDLoss redmd_arguments(Tensor x, Tensor fake, Tensor real_cond, OptionalTensor real_uncond,
                                 OptionalTensor fake_uncond, Tensor weight, OptionalTensor mask, double guidance_scale,
                                 double fake_guidance_scale) {
  const auto latent = [&](const Tensor& t) {
    check_same_device(t, x);
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() == x.numel(), "latents must be contiguous and of one shape");
    return LatentView{static_cast<const char*>(t.const_data_ptr()), dtype_of(t)};
  };
  ReDMDLoss args{};
  args.x = latent(x);
  args.fake = latent(fake);
  args.real_cond = latent(real_cond);
  if (real_uncond) args.real_uncond = latent(*real_uncond);
  if (fake_uncond) args.fake_uncond = latent(*fake_uncond);
  args.batch = x.size(0);
  args.elements = args.batch == 0 ? 0 : x.numel() / args.batch;
  const DType accumulator = accumulator_of(args.x.dtype);
  check_same_device(weight, x);
  STD_TORCH_CHECK(dtype_of(weight) == accumulator && weight.is_contiguous() && weight.numel() == args.batch,
                  "weight must be contiguous [batch] in float32 (float64 for a float64 x)");
  args.weight = weight.const_data_ptr();
  if (mask) {
    check_same_device(*mask, x);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == x.numel(),
                    "mask must be contiguous bool of x's shape");
    args.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  args.guidance_scale = guidance_scale;
  args.fake_guidance_scale = fake_guidance_scale;
  return args;
}

}  // namespace rfkernels
