// dK and dV: a block owns a tile of keys of one KV head and sweeps the queries of the head's group that see them.
// kChunk: the open chunk's own keys; nothing is computed for the past.
#pragma once
#include "backward.h"

namespace rfkernels::cuda {

// One tile of queries: weights times the output's gradients to dV, scores' gradients times queries to dK.
template <class Config>
__device__ __forceinline__ void grad_kv_step(typename Config::Accumulator& sum_k, typename Config::Accumulator& sum_v,
                                             const AttentionProblem& p, const Sweep& queries, bool outside, int key,
                                             int row, int part, uint32_t terms, const OwnAddresses<Config>& own,
                                             const SweptAddresses<Config>& swept) {
  const float scale2 = p.scale * kLog2E;
  typename Config::Scores w = {}, grad = {};
  multiply<Config, 0>(w, own, swept);
  float delta[Config::kUnits][2];  // of the thread's columns, which are queries here
#pragma unroll
  for (int n = 0; n < Config::kUnits; ++n) {
    float lse2[2];
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(lse2[0]), "=f"(delta[n][0]), "=f"(lse2[1]), "=f"(delta[n][1])
                 : "r"(terms + (8 * n + threadIdx.x % 4 * 2) * 8)
                 : "memory");
#pragma unroll
    for (int m = 0; m < Config::kRowBlocks; ++m)
#pragma unroll
      for (int i = 0; i < 4; ++i) w[m][n][i] = exp2_fast(__fmaf_rn(w[m][n][i], scale2, -lse2[i % 2]));
  }
  if (queries.hides(row, Config::kSwept)) {
    if (p.use == Use::kWindow) {
      const int offset = p.keys - p.queries;
#pragma unroll
      for (int r = 0; r < Config::kRows; ++r)
        hide_unseen<Config>(w, r, seeing_queries(p.mask, min(key + 8 * r, p.keys - 1), outside, p.keys), row + offset);
    }  // kChunk: rows past the end are zeros
  }
  accumulate<Config, 1>(sum_v, w, swept, part);
  multiply<Config, 1>(grad, own, swept);
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m)
#pragma unroll
    for (int n = 0; n < Config::kUnits; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) w[m][n][i] *= grad[m][n][i] - delta[n][i % 2];
  accumulate<Config, 0>(sum_k, w, swept, part);
}

// Scaled; zeros for keys of frames that the stream does not have, which may be NaN.
template <class Config>
__device__ __forceinline__ void scale_present(typename Config::Accumulator& sum, float scale, int key, int missing) {
#pragma unroll
  for (int r = 0; r < Config::kRows; ++r)
#pragma unroll
    for (int n = 0; n < Config::kColumnUnits; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = sum[r / 2][n][r % 2 * 2 + i];
        x = key + 8 * r < missing ? 0.0f : x * scale;
      }
}

template <class Config>
__device__ __forceinline__ void attention_grad_kv(const BackwardParams& params) {
  extern __shared__ __align__(128) uint8_t shared[];
  state_shared_bytes<Config::kSharedBytes>();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
  const AttentionProblem& p = params.problem;
  const bool window = p.use == Use::kWindow;
  const int count = window ? p.keys : p.queries, group = p.heads / p.kv_heads;
  const int blocks = (count + Config::kOwn - 1) / Config::kOwn;
  const int kv_head = blockIdx.x / blocks % p.kv_heads, sample = blockIdx.x / blocks / p.kv_heads;
  const int first_key = blockIdx.x % blocks * Config::kOwn, last_key = min(first_key + Config::kOwn, count) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = warp % Config::kParts;
  const int warp_row = warp / Config::kParts * 16 * Config::kRowBlocks, key = first_key + warp_row + lane / 4;
  StreamRows stream;
  if (!window) stream.find_open(p, int(p.num_frames[sample]));

  const Rows& rk = window ? p.k : p.own_k;
  const Rows& rv = window ? p.v : p.own_v;
  const OwnAddresses<Config> own(base + warp_row * Config::OwnTile::kRowBytes, lane);
  typename Config::Accumulator sum_k = {}, sum_v = {};
  copy_rows<Config, typename Config::OwnTile>(base, row_address(rk, sample, first_key, kv_head), 2 * rk.token,
                                              count - first_key);
  copy_rows<Config, typename Config::OwnTile>(
      base + Config::OwnTile::kBytes, row_address(rv, sample, first_key, kv_head), 2 * rv.token, count - first_key);
  commit_copies();

#pragma unroll 1
  for (int turn = 0; turn < group * (window ? 2 : 1); ++turn) {
    const bool outside = turn >= group;
    const int head = kv_head * group + turn % group;
    const Sweep queries = swept_queries(p, stream, outside, first_key, last_key);
    if (queries.begin >= queries.end) continue;
    const Rows& q = outside ? params.sink_q : p.q;
    const char* q_rows = row_address(q, sample, 0, head);
    const char* grad_rows = row_address(params.grad_out, sample, 0, head);
    const int64_t q_step = 2 * q.token, grad_step = 2 * params.grad_out.token;
    const float* terms = params.row_terms + 2 * ((int64_t(sample) * p.heads + head) * p.queries);
    auto copy_queries = [&](int row, int stage) {
      const uint32_t tile = base + Config::kSharedSwept + stage * Config::kStageBytes;
      const int rows = queries.end - row;
      copy_rows<Config, typename Config::SweptTile>(tile, q_rows + row * q_step, q_step, rows);
      copy_rows<Config, typename Config::SweptTile>(tile + Config::SweptTile::kBytes, grad_rows + row * grad_step,
                                                    grad_step, rows);
      if (threadIdx.x < Config::kSwept)
        copy_async8_or_zero(tile + Config::kTermsAt + threadIdx.x * 8, terms + 2 * (row + int(threadIdx.x)),
                            int(threadIdx.x) < rows);
      commit_copies();
    };
    __syncthreads();  // every warp is done with the last turn
    copy_queries(queries.begin, 0);
    int stage = 0;
#pragma unroll 1
    for (int row = queries.begin; row < queries.end; row += Config::kSwept, stage ^= 1) {
      wait_copies<0>();
      __syncthreads();  // this tile is there; every warp is done with the one before
      if (row + Config::kSwept < queries.end) copy_queries(row + Config::kSwept, stage ^ 1);
      const uint32_t tile = base + Config::kSharedSwept + stage * Config::kStageBytes;
      const SweptAddresses<Config> swept(tile, lane);
      grad_kv_step<Config>(sum_k, sum_v, p, queries, outside, key, row, part, tile + Config::kTermsAt, own, swept);
    }
  }

  wait_copies<0>();
  scale_present<Config>(sum_k, p.scale, key, stream.missing);
  scale_present<Config>(sum_v, 1.0f, key, stream.missing);
  const FloatTile<Config> result{base};
  const int64_t first = (int64_t(sample) * count + first_key) * p.kv_heads + kv_head;
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    __syncthreads();
    result.template exchange<true>(which == 0 ? sum_k : sum_v, warp_row, part);
    __syncthreads();
    store_rows(result, which == 0 ? params.grad_k : params.grad_v, which == 0 ? params.grad_k_type : params.grad_v_type,
               first, p.kv_heads, last_key + 1 - first_key, p.rope, which == 0 && p.rope.frame_turns != nullptr,
               first_key, stream.first_frame, int(p.frame_tokens));
  }
}

}  // namespace rfkernels::cuda
