// dQ: a block owns a tile of queries of one head and sweeps the keys that they see.
#pragma once
#include "backward.h"

namespace rfkernels::cuda {

// One contiguous range of keys that a tile of queries sweeps; parts as in swept_keys.
struct SweptKeys : Sweep {
  const char *k, *v;       // token 0
  int64_t k_step, v_step;  // bytes from token to token

  __device__ SweptKeys(const AttentionProblem& p, int sample, int head, int part, int first_row, int last_row)
      : Sweep(swept_keys(p, StreamRows(p, sample), part, first_row, last_row)) {
    const bool own = p.use == Use::kChunk && part == 1;
    const Rows& rk = own ? p.own_k : p.k;
    const Rows& rv = own ? p.own_v : p.v;
    const int kv_head = head / (p.heads / p.kv_heads);
    k = row_address(rk, sample, 0, kv_head), v = row_address(rv, sample, 0, kv_head);
    k_step = 2 * rk.token, v_step = 2 * rv.token;
  }
};

// A row's place and terms, for the rows of a thread.
template <class Config>
struct ThreadRows {
  float lse2[Config::kRows], delta[Config::kRows];

  __device__ __forceinline__ ThreadRows(const float2* terms, int row, int queries) {
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r) {
      const float2 both = row + 8 * r < queries ? terms[row + 8 * r] : make_float2(-kUnseen, 0.0f);
      lse2[r] = both.x, delta[r] = both.y;
    }
  }
};

// The scores' gradients of one tile, times the keys.
template <class Config>
__device__ __forceinline__ void grad_q_step(typename Config::Accumulator& sum, const AttentionProblem& p,
                                            const ThreadRows<Config>& rows, const SweptKeys& keys, int part, int row,
                                            int key, int column_part, const OwnAddresses<Config>& own,
                                            const SweptAddresses<Config>& swept) {
  const float scale2 = p.scale * kLog2E;
  typename Config::Scores w = {}, grad = {};
  multiply<Config, 0>(w, own, swept);
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m)
#pragma unroll
    for (int n = 0; n < Config::kUnits; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) w[m][n][i] = exp2_fast(__fmaf_rn(w[m][n][i], scale2, -rows.lse2[2 * m + i / 2]));
  if (keys.hides(key, Config::kSwept)) {
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r)
      hide_unseen<Config>(w, r, keys_of_row(p, part, row + 8 * r, keys.begin, keys.end), key);
  }
  multiply<Config, 1>(grad, own, swept);
#pragma unroll
  for (int m = 0; m < Config::kRowBlocks; ++m)
#pragma unroll
    for (int n = 0; n < Config::kUnits; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) w[m][n][i] *= grad[m][n][i] - rows.delta[2 * m + i / 2];
  accumulate<Config, 0>(sum, w, swept, column_part);
}

// Queries met the sinks outside their window at a frame earlier by the evicted ones: turns what they gathered there on
// by that many frames, so that one turn back at the end serves everything.
template <class Config>
__device__ __forceinline__ void turn_by_evicted(const FloatTile<Config>& tile, const AttentionProblem& p, int first_row,
                                                int last_row) {
  const PairWalk<Config> walk(p.rope.half_split);
  if (walk.slot >= walk.kSlots || walk.first_pair >= p.rope.frame_pairs) return;
  PhaseCache phases;
#pragma unroll
  for (int i = 0; i < kPhases; ++i)
    phases.cos[i] = 1.0f, phases.sin[i] = 0.0f;  // rows and columns of a frame are not evicted
#pragma unroll 1
  for (int row = walk.slot; row <= last_row - first_row; row += walk.kSlots) {
    float a[4], b[4];
    tile.load4(a, row, walk.first);
    tile.load4(b, row, walk.second);
    const int index = first_row + row + p.keys - p.queries;
    phases.set_frame(p.rope, walk.first_pair, evicted_frames(p.mask, index, p.frame_tokens));
    phases.rotate(a, b, p.rope.half_split);
    tile.store4(a, row, walk.first);
    tile.store4(b, row, walk.second);
  }
}

template <class Config>
__device__ __forceinline__ void attention_grad_q(const BackwardParams& params) {
  extern __shared__ __align__(128) uint8_t shared[];
  state_shared_bytes<Config::kSharedBytes>();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
  const AttentionProblem& p = params.problem;
  const int blocks = (p.queries + Config::kOwn - 1) / Config::kOwn;
  const int head = blockIdx.x / blocks % p.heads, sample = blockIdx.x / blocks / p.heads;
  const int first_row = blockIdx.x % blocks * Config::kOwn, last_row = min(first_row + Config::kOwn, p.queries) - 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, column_part = warp % Config::kParts;
  const int warp_row = warp / Config::kParts * 16 * Config::kRowBlocks;
  const int row = first_row + warp_row + lane / 4;

  const OwnAddresses<Config> own(base + warp_row * Config::OwnTile::kRowBytes, lane);
  const FloatTile<Config> result{base};
  const int64_t place = int64_t(sample) * p.heads + head;
  const ThreadRows<Config> rows(reinterpret_cast<const float2*>(params.row_terms) + place * p.queries, row, p.queries);
  typename Config::Accumulator sum = {};

#pragma unroll 1
  for (int part = 1; part >= 0; --part) {
    const SweptKeys keys(p, sample, head, part, first_row, last_row);
    if (keys.begin >= keys.end) continue;
    const bool sinks = part == 1 && p.use == Use::kWindow;
    auto copy_keys = [&](int key, int stage) {
      const uint32_t tile = base + Config::kSharedSwept + stage * Config::kStageBytes;
      const int count = keys.end - key;
      copy_rows<Config, typename Config::SweptTile>(tile, keys.k + key * keys.k_step, keys.k_step, count);
      copy_rows<Config, typename Config::SweptTile>(tile + Config::SweptTile::kBytes, keys.v + key * keys.v_step,
                                                    keys.v_step, count);
      commit_copies();
    };
    __syncthreads();  // every warp is done with the other part
    const Rows& q = sinks ? params.sink_q : p.q;
    copy_rows<Config, typename Config::OwnTile>(base, row_address(q, sample, first_row, head), 2 * q.token,
                                                p.queries - first_row);
    copy_rows<Config, typename Config::OwnTile>(base + Config::OwnTile::kBytes,
                                                row_address(params.grad_out, sample, first_row, head),
                                                2 * params.grad_out.token, p.queries - first_row);
    copy_keys(keys.begin, 0);
    int stage = 0;
#pragma unroll 1
    for (int key = keys.begin; key < keys.end; key += Config::kSwept, stage ^= 1) {
      wait_copies<0>();
      __syncthreads();  // this tile is there; every warp is done with the one before
      if (key + Config::kSwept < keys.end) copy_keys(key + Config::kSwept, stage ^ 1);
      const SweptAddresses<Config> swept(base + Config::kSharedSwept + stage * Config::kStageBytes, lane);
      grad_q_step<Config>(sum, p, rows, keys, part, row, key, column_part, own, swept);
    }
    if (sinks && p.rope.frame_turns != nullptr) {
      __syncthreads();
      result.template exchange<true>(sum, warp_row, column_part);
      __syncthreads();
      turn_by_evicted(result, p, first_row, last_row);
      __syncthreads();
      result.template exchange<false>(sum, warp_row, column_part);
    }
  }

#pragma unroll
  for (int r = 0; r < Config::kRows; ++r)
#pragma unroll
    for (int n = 0; n < Config::kColumnUnits; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& x = sum[r / 2][n][r % 2 * 2 + i];
        x = rows.lse2[r] == -kUnseen ? 0.0f : x * p.scale;  // a query that nobody answered may be NaN
      }
  __syncthreads();
  result.template exchange<true>(sum, warp_row, column_part);
  __syncthreads();
  const bool window = p.use == Use::kWindow;
  const int first_frame = window ? 0 : int(p.num_frames[sample]) - p.queries / int(p.frame_tokens);
  store_rows(result, params.grad_q, params.grad_q_type, (int64_t(sample) * p.queries + first_row) * p.heads + head,
             p.heads, last_row + 1 - first_row, p.rope, p.rope.frame_turns != nullptr,
             first_row + (window ? p.keys - p.queries : 0), first_frame, int(p.frame_tokens));
}

}  // namespace rfkernels::cuda
