// From requests to the plain structs of kernels.h, for every device. Python checks arguments for people; what is
// checked here would otherwise read or write out of bounds.
#pragma once
#include <torch/csrc/stable/ops.h>

#include "../kernels.h"
#include "requests.h"

namespace rfkernels {

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

inline RopeView rope_view(const requests::Rope& from, int64_t frame_tokens, int64_t head_dim, DType accumulator,
                          const Tensor& other) {
  const auto& [frame_turns, spatial, half_split] = from;
  RopeView rope;
  if (!frame_turns) return rope;
  STD_TORCH_CHECK(spatial.has_value(), "frame_turns and spatial come together");
  check_same_device(*frame_turns, other);
  check_same_device(*spatial, other);
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

inline Cache cache_view(const requests::CacheTensors& from, const requests::Rope& rope, const CacheGeometry& geometry) {
  const Tensor& k = from.k;
  Cache cache{view(k, k), view(from.v, k), view(from.sink_k, k), view(from.sink_v, k), geometry, {}};
  STD_TORCH_CHECK(geometry.sink_frames >= 0 && geometry.window_frames >= 1 && geometry.frame_tokens >= 1,
                  "impossible cache geometry");
  const auto covers = [&](const TensorView& x, int64_t frames) {
    return !x || (x.layers == cache.k.layers && x.batch == cache.k.batch && x.heads == cache.k.heads &&
                  x.head_dim == cache.k.head_dim && x.tokens >= frames * geometry.frame_tokens);
  };
  const int64_t frames = geometry.sink_frames + geometry.window_frames;
  STD_TORCH_CHECK(covers(cache.k, frames) && covers(cache.v, frames) && covers(cache.sink_k, geometry.sink_frames) &&
                      covers(cache.sink_v, geometry.sink_frames),
                  "cache tensors do not match each other or the geometry");
  cache.rope = rope_view(rope, geometry.frame_tokens, cache.k.head_dim, accumulator_of(cache.k.dtype), k);
  return cache;
}

inline BeginChunk arguments_of(const requests::BeginChunk& from) {
  BeginChunk args{};
  args.cache = cache_view(from.cache, from.rope, from.geometry);
  const TensorView& k = args.cache.k;
  STD_TORCH_CHECK(from.new_frames >= 0 && from.new_frames <= from.geometry.sink_frames + from.geometry.window_frames,
                  "new_frames must be in 0..sink_frames + window_frames");
  args.num_frames = frame_counts(from.num_frames, k.batch, from.cache.k);
  args.new_frames = from.new_frames;
  args.before_window = from.before_window;
  if (const OptionalTensor& advancing = from.advancing) {
    check_same_device(*advancing, from.cache.k);
    STD_TORCH_CHECK(
        advancing->scalar_type() == ScalarType::Bool && advancing->is_contiguous() && advancing->numel() == k.batch,
        "advancing must be contiguous bool [batch]");
    args.advancing = advancing->const_data_ptr<bool>();
  }
  if (const OptionalTensor& decay = from.decay) {
    check_same_device(*decay, from.cache.k);
    STD_TORCH_CHECK(
        dtype_of(*decay) == accumulator_of(k.dtype) && decay->is_contiguous() && decay->numel() == 2 * k.heads,
        "decay must be contiguous [2, heads] in the accumulators' dtype");
    args.decay = decay->const_data_ptr();
  }
  return args;
}

inline Write arguments_of(const requests::Write& from) {
  Write args{};
  args.cache = cache_view(from.cache, from.rope, from.geometry);
  args.new_k = view(from.new_k, from.cache.k);
  args.new_v = view(from.new_v, from.cache.k);
  const TensorView& k = args.cache.k;
  const auto matches = [&](const TensorView& x) {
    return x.layers == 1 && x.batch == k.batch && x.heads == k.heads && x.head_dim == k.head_dim &&
           x.tokens == args.new_k.tokens;
  };
  STD_TORCH_CHECK(k.layers == 1 && matches(args.new_k) && matches(args.new_v),
                  "new k and v must be [batch, tokens, heads, head_dim] of the cache");
  const int64_t tokens = from.geometry.frame_tokens;
  STD_TORCH_CHECK(args.new_k.tokens % tokens == 0 &&
                      args.new_k.tokens <= (from.geometry.sink_frames + from.geometry.window_frames) * tokens,
                  "new k and v must hold whole frames, at most sink_frames + window_frames");
  args.num_frames = frame_counts(from.num_frames, k.batch, from.cache.k);
  return args;
}

// Without `frames`, which the caller fills in. out: of x's shape, any strides.
inline Rotate rotate_view(const Tensor& x, const Tensor& out, const requests::Rope& rope, int64_t frame_tokens) {
  Rotate args{};
  args.x = view(x, x);
  args.out = view(out, x);
  args.frame_tokens = frame_tokens;
  args.precision = rope.spatial ? dtype_of(*rope.spatial) : accumulator_of(args.out.dtype);
  args.rope = rope_view(rope, frame_tokens, args.x.head_dim, accumulator_of(args.precision), x);
  return args;
}

inline Rotate arguments_of(const requests::Rotate& from, const Tensor& out) {
  const Tensor &x = from.x, &frames = from.frames;
  STD_TORCH_CHECK(x.dim() == 4 && from.rope.spatial->dim() == 3, "x must have rank 4, spatial 3");
  check_same_device(frames, x);
  STD_TORCH_CHECK(frames.scalar_type() == ScalarType::Long && frames.is_contiguous() && frames.dim() == 2 &&
                      (frames.size(0) == 1 || frames.size(0) == x.size(0)) && frames.size(1) > 0 &&
                      x.size(1) % frames.size(1) == 0,
                  "frames must be contiguous int64 [batch or 1, entries] with entries dividing the tokens");
  const int64_t frame_tokens = from.rope.spatial->size(0);
  STD_TORCH_CHECK(from.first_token >= 0 && frame_tokens >= 1, "first_token must not be negative, nor spatial empty");
  Rotate args = rotate_view(x, out, from.rope, frame_tokens);
  args.frames = frames.const_data_ptr<int64_t>();
  args.entries = frames.size(1);
  args.frames_batch_stride = frames.size(0) == 1 ? 0 : args.entries;
  args.first_token = from.first_token;
  args.inverse = from.inverse;
  return args;
}

// The outputs, grad and loss, are left to the caller.
inline ReDMDLoss arguments_of(const requests::ReDMD& from) {
  const Tensor& x = from.x;
  const auto latent = [&](const Tensor& t) {
    check_same_device(t, x);
    STD_TORCH_CHECK(t.is_contiguous() && t.numel() == x.numel(), "latents must be contiguous and of one shape");
    return LatentView{static_cast<const char*>(t.const_data_ptr()), dtype_of(t)};
  };
  ReDMDLoss args{};
  args.x = latent(x);
  args.fake = latent(from.fake);
  args.real_cond = latent(from.real_cond);
  if (from.real_uncond) args.real_uncond = latent(*from.real_uncond);
  if (from.fake_uncond) args.fake_uncond = latent(*from.fake_uncond);
  args.batch = x.size(0);
  args.elements = args.batch == 0 ? 0 : x.numel() / args.batch;
  check_same_device(from.weight, x);
  STD_TORCH_CHECK(dtype_of(from.weight) == accumulator_of(args.x.dtype) && from.weight.is_contiguous() &&
                      from.weight.numel() == args.batch,
                  "weight must be contiguous [batch] in float32 (float64 for a float64 x)");
  args.weight = from.weight.const_data_ptr();
  if (const OptionalTensor& mask = from.mask) {
    check_same_device(*mask, x);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->is_contiguous() && mask->numel() == x.numel(),
                    "mask must be contiguous bool of x's shape");
    args.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
  }
  args.guidance_scale = from.guidance_scale;
  args.fake_guidance_scale = from.fake_guidance_scale;
  return args;
}

}  // namespace rfkernels
