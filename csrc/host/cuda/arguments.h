// Tensors to the attention problem that the kernels take, forward and backward.
#pragma once
#include "../../cuda/attention/params.h"
#include "launch.h"

namespace rfkernels::cuda {

inline Rows rows(const TensorView& x) {
  const int64_t item = item_size(x.dtype);
  STD_TORCH_CHECK(!x || x.aligned, "attention needs rows that begin at multiples of 16 bytes");
  STD_TORCH_CHECK(x.tokens <= 1 || x.token_stride / item < kFarthestTokens,
                  "attention needs tokens less than 2**24 elements apart");
  return {x.data, x.batch_stride / item, x.token_stride / item, x.head_stride / item};
}

inline ElementType element_type(DType dtype) {
  return dtype == DType::Float16    ? ElementType::kFloat16
         : dtype == DType::BFloat16 ? ElementType::kBFloat16
                                    : ElementType::kFloat32;
}

inline AttentionProblem attention_problem(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const OptionalTensor& own_k, const OptionalTensor& own_v,
                                          const OptionalTensor& num_frames, int64_t frame_tokens, int64_t capacity,
                                          int64_t sink_tokens, int64_t window_tokens, int64_t chunk_tokens,
                                          int64_t first_chunk_tokens, bool own_chunk, const OptionalTensor& frame_turns,
                                          const OptionalTensor& spatial, bool half_split, double scale) {
  const TensorView vq = view(q, k), vk = view(k, k), vv = view(v, k), vok = view(own_k, k), vov = view(own_v, k);
  const auto like_k = [&](const TensorView& x, int64_t tokens) {
    return x.dtype == vk.dtype && x.batch == vk.batch && x.heads == vk.heads && x.head_dim == vk.head_dim &&
           x.tokens == tokens;
  };
  check_served(k, vk.head_dim);
  STD_TORCH_CHECK(vq.dtype != DType::Float64 && vq.batch == vk.batch && vq.head_dim == vk.head_dim && vk.heads > 0 &&
                      vq.heads % vk.heads == 0 && like_k(vv, vk.tokens),
                  "q, k and v do not match each other");
  STD_TORCH_CHECK(own_k.has_value() == own_v.has_value() && (!own_k || num_frames) &&
                      (!own_k || (like_k(vok, vq.tokens) && like_k(vov, vq.tokens))),
                  "own_k and own_v must be the chunk's own keys and values, and need num_frames");
  STD_TORCH_CHECK(frame_tokens > 0 && chunk_tokens > 0 && first_chunk_tokens > 0 && vk.tokens < (int64_t(1) << 31) &&
                      vq.tokens < (int64_t(1) << 31),
                  "impossible sizes");

  AttentionProblem p{};
  p.use = !num_frames ? Use::kWindow : own_k ? Use::kChunk : Use::kPrefix;
  STD_TORCH_CHECK(p.use == Use::kWindow
                      ? vq.tokens <= vk.tokens
                      : vq.tokens % frame_tokens == 0 && vk.tokens + vok.tokens >= capacity * frame_tokens,
                  "queries or keys do not fit the geometry");
  p.q = rows(vq), p.k = rows(vk), p.v = rows(vv), p.own_k = rows(vok), p.own_v = rows(vov);
  if (num_frames) p.num_frames = frame_counts(*num_frames, vq.batch, k);
  if (frame_turns) {
    check_same_device(*frame_turns, k);
    const RopeView rope = rope_view(frame_turns, spatial, half_split, frame_tokens, vk.head_dim, DType::Float32);
    p.rope = {rope.frame_turns, static_cast<const float*>(rope.spatial), int32_t(rope.frame_pairs), half_split};
  }
  p.mask = {sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, own_chunk};
  p.frame_tokens = frame_tokens;
  p.capacity = capacity;
  p.batch = int32_t(vq.batch), p.queries = int32_t(vq.tokens), p.keys = int32_t(vk.tokens);
  p.heads = int32_t(vq.heads), p.kv_heads = int32_t(vk.heads);
  p.q_type = element_type(vq.dtype);
  p.scale = float(scale);
  return p;
}

}  // namespace rfkernels::cuda
