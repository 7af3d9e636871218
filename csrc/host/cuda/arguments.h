// Requests to the attention problem that the kernels take, forward and backward.
#pragma once
#include "../../cuda/attention/params.h"
#include "launch.h"
#include "requests.h"

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

inline void check_keys(const requests::Keys& keys, const TensorView& q, const TensorView& k) {
  const auto like_k = [&](const OptionalTensor& tensor, int64_t tokens) {
    const TensorView x = view(tensor, keys.k);
    return x.dtype == k.dtype && x.batch == k.batch && x.heads == k.heads && x.head_dim == k.head_dim &&
           x.tokens == tokens;
  };
  STD_TORCH_CHECK(q.dtype != DType::Float64 && q.batch == k.batch && q.head_dim == k.head_dim && k.heads > 0 &&
                      q.heads % k.heads == 0 && like_k(keys.v, k.tokens),
                  "q, k and v do not match each other");
  const bool own = keys.own_k.has_value();
  STD_TORCH_CHECK(own == keys.own_v.has_value() && (!own || keys.num_frames) &&
                      (!own || (like_k(keys.own_k, q.tokens) && like_k(keys.own_v, q.tokens))),
                  "own_k and own_v must be the chunk's own keys and values, and need num_frames");
  const int64_t tokens = keys.frame_tokens;
  STD_TORCH_CHECK(tokens > 0 && keys.mask.chunk_tokens > 0 && keys.mask.first_chunk_tokens > 0 &&
                      k.tokens < (int64_t(1) << 31) && q.tokens < (int64_t(1) << 31),
                  "impossible sizes");
  STD_TORCH_CHECK(keys.num_frames ? q.tokens % tokens == 0 && k.tokens + (own ? q.tokens : 0) >= keys.capacity * tokens
                                  : q.tokens <= k.tokens,
                  "queries or keys do not fit the geometry");
}

inline AttentionProblem attention_problem(const Tensor& q, const requests::Keys& keys, const requests::Rope& rope,
                                          double scale) {
  const Tensor& k = keys.k;
  const TensorView vq = view(q, k), vk = view(k, k);
  check_served(k, vk.head_dim);
  check_keys(keys, vq, vk);
  AttentionProblem p{};
  p.use = !keys.num_frames ? Use::kWindow : keys.own_k ? Use::kChunk : Use::kPrefix;
  p.q = rows(vq), p.k = rows(vk), p.v = rows(view(keys.v, k));
  p.own_k = rows(view(keys.own_k, k)), p.own_v = rows(view(keys.own_v, k));
  if (keys.num_frames) p.num_frames = frame_counts(*keys.num_frames, vq.batch, k);
  const RopeView turns = rope_view(rope, keys.frame_tokens, vk.head_dim, DType::Float32, k);
  p.rope = {turns.frame_turns, static_cast<const float*>(turns.spatial), int32_t(turns.frame_pairs), turns.half_split};
  p.mask = keys.mask;
  p.frame_tokens = keys.frame_tokens;
  p.capacity = keys.capacity;
  p.batch = int32_t(vq.batch), p.queries = int32_t(vq.tokens), p.keys = int32_t(vk.tokens);
  p.heads = int32_t(vq.heads), p.kv_heads = int32_t(vk.heads);
  p.q_type = element_type(vq.dtype);
  p.scale = float(scale);
  return p;
}

}  // namespace rfkernels::cuda
