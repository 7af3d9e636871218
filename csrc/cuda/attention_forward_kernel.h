// The kernel of the attention forward, step by step; the steps are in attention_forward.h.
#pragma once
#include "attention_forward.h"

namespace rfkernels::cuda {

// What the main loop needs of a segment but once a tile waits in shared memory: its registers are all taken. A tile of
// which between kLastFull and kFirstFull keys are left is seen by every row.
enum KeptInShared { kFirstFull = 0, kLastFull = 4, kPart = 8, kKStep = 12, kVStep = 16, kEnd = 20 };

__device__ __forceinline__ void put_shared(uint32_t address, int x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ int get_shared(uint32_t address) {
  int x;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address));
  return x;
}

// Sets scores of keys that a row does not see to -inf: tiles at the edge of a segment only.
template <class Config, class Scores>
__device__ __forceinline__ void hide_unseen(Scores& s, const ForwardParams& params, int end, int part, int first_key) {
  const AttentionProblem& p = params.problem;
  const int thread = not_before(threadIdx.x), block = not_before(blockIdx.x) % params.row_blocks;
  const int row = block * Config::kTileRows + thread / 32 * 16 * Config::kRowBlocks + thread % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2 * Config::kRowBlocks; ++r) {
    Range seen = {0, end};
    if (p.use == Use::kWindow)
      seen = visible_keys(p.mask, min(row + 8 * r, p.queries - 1) + p.keys - p.queries, part == 1, p.keys);
    const int before = not_before(first_key + thread % 4 * 2 - seen.begin);
    const unsigned count = not_before(max(seen.end - seen.begin, 0));  // one comparison a score, whatever the use
#pragma unroll
    for (int n = 0; n < Config::kTileKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float& score = s[r / 2][n][r % 2 * 2 + i];
        score = unsigned(before + 8 * n + i) < count ? score : kUnseen;
      }
  }
}

// Whole rows of the output, by way of shared memory: 16 bytes a thread. Of the queries' tile a warp uses only the rows
// that it alone reads, so no barrier is needed.
template <class Config>
__device__ __forceinline__ void store(const WarpRows<Config>& rows, const ForwardParams& params, uint32_t sQ) {
  using T = typename Config::Element;
  using QTile = typename Config::QTile;
  const AttentionProblem& p = params.problem;
  const QueryTile tile(params, Config::kTileRows);
  const int thread = not_before(threadIdx.x), lane = thread % 32, warp_row = thread / 32 * 16 * Config::kRowBlocks;
  const int64_t place = int64_t(tile.split) * p.batch + tile.sample;
#pragma unroll
  for (int r = 0; r < 2 * Config::kRowBlocks; ++r) {
    const int local = warp_row + lane / 4 + 8 * r, row = tile.first_row + local;
    const bool exists = row >= tile.missing;
    const float normaliser = exists ? rows.softmax.normaliser(r) : 0.0f;
    if (lane % 4 == 0 && row <= tile.last_row)
      params.lse[(place * p.heads + tile.head) * p.queries + row] = exists ? rows.softmax.lse(r) : kUnseen;
    const auto value = [&](int n, int i) { return exists ? rows.rOut[r / 2][n][r % 2 * 2 + i] * normaliser : 0.0f; };
    if (params.splits > 1) {
      float* part =
          static_cast<float*>(params.out) + ((place * p.queries + row) * p.heads + tile.head) * Config::kHeadDim;
      if (row <= tile.last_row) {
#pragma unroll
        for (int n = 0; n < Config::kHeadDim / 8; ++n)
          *reinterpret_cast<float2*>(part + 8 * n + lane % 4 * 2) = make_float2(value(n, 0), value(n, 1));
      }
    } else {
#pragma unroll
      for (int n = 0; n < Config::kHeadDim / 8; ++n)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(sQ + QTile::offset(local, n) + lane % 4 * 4),
                     "r"(pack<T>(value(n, 0), value(n, 1)))
                     : "memory");
    }
  }
  if (params.splits > 1) return;
  __syncwarp();
  constexpr int kUnits = QTile::kUnits;
#pragma unroll 4
  for (int i = lane; i < 16 * Config::kRowBlocks * kUnits; i += 32) {
    const int local = warp_row + i / kUnits, unit = i % kUnits, row = tile.first_row + local;
    if (row > tile.last_row) break;
    uint4 bits;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "r"(sQ + QTile::offset(local, unit)));
    T* out = static_cast<T*>(params.out) + ((place * p.queries + row) * p.heads + tile.head) * Config::kHeadDim;
    reinterpret_cast<uint4*>(out)[unit] = bits;
  }
}

template <class Config>
__device__ __forceinline__ void attention_forward(const ForwardParams& params) {
  extern __shared__ __align__(128) uint8_t shared[];
  state_shared_bytes<Config::kSharedBytes>();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t sQ = base + Config::kSharedQ;
  const AttentionProblem& p = params.problem;

  const int warp_row = threadIdx.x / 32 * 16 * Config::kRowBlocks, lane = threadIdx.x % 32;
  const typename WarpRows<Config>::QAddresses q_blocks(sQ + warp_row * Config::QTile::kRowBytes, lane);
  const typename WarpRows<Config>::KAddresses k_blocks(base + Config::kSharedK, lane);
  const typename WarpRows<Config>::VAddresses v_blocks(base + Config::kSharedV, lane);
  WarpRows<Config> rows;
  // A scale of zero still has to keep what is unseen at -inf.
  const float scale2 = fmaxf(fabsf(p.scale) * kLog2E, 1e-30f);

#pragma unroll 1
  for (int part = 0; part < (p.use == Use::kPrefix ? 1 : 2); ++part) {
    const QueryTile tile(params, Config::kTileRows);
    const KeySegment keys(params, tile, part, Config::kTileKeys);
    if (keys.begin >= keys.end) continue;
    // Sinks outside the window meet the queries in another rotation. Without a rope that turn changes nothing.
    const bool for_sinks = part == 1 && p.use == Use::kWindow;
    if (part > 0) __syncthreads();  // every warp is done with the last segment
    const uint32_t sKept = base + Config::kSharedKept;
    const uint32_t sK = base + Config::kSharedK, sV = base + Config::kSharedV;
    TileCopier<Config> copy_k(keys.k, keys.k_step), copy_v(keys.v, keys.v_step);
    if (threadIdx.x == 0) {
      put_shared(sKept + kFirstFull, keys.end - keys.full_begin);
      put_shared(sKept + kLastFull, keys.end - keys.full_end + Config::kTileKeys);
      put_shared(sKept + kEnd, keys.end);
      put_shared(sKept + kPart, part);
      put_shared(sKept + kKStep, TileCopier<Config>::row_step(keys.k_step));
      put_shared(sKept + kVStep, TileCopier<Config>::row_step(keys.v_step));
    }
    copy_k.copy(sK, keys.end - keys.begin, TileCopier<Config>::row_step(keys.k_step));
    load_queries<Config>(p, tile, sQ, for_sinks);
#pragma unroll 1
    for (int left = keys.end - keys.begin; left > 0; left -= Config::kTileKeys) {
      wait_copies<0>();
      __syncthreads();  // keys (and queries) are there; every warp is done with the last values
      copy_v.copy(sV, left, get_shared(sKept + kVStep));
      typename WarpRows<Config>::Scores scores = {};
      rows.scores(scores, not_before(q_blocks), not_before(k_blocks));
      if (left > get_shared(sKept + kFirstFull) || left < get_shared(sKept + kLastFull)) {
        const int end = get_shared(sKept + kEnd);
        hide_unseen<Config>(scores, params, end, get_shared(sKept + kPart), end - left);
      }
      typename WarpRows<Config>::Weights weights;
      rows.weigh(weights, scores, scale2);
      wait_copies<0>();
      __syncthreads();  // values are there; every warp is done with the keys
      if (left > Config::kTileKeys) copy_k.copy(sK, left - Config::kTileKeys, get_shared(sKept + kKStep));
      rows.accumulate(weights, not_before(v_blocks));
    }
    part = get_shared(sKept + kPart);
  }
  rows.softmax.finish();
  store(rows, params, sQ);
}

}  // namespace rfkernels::cuda

// One entry per head size and type, in a file of its own so that they compile side by side. Readable names: the host's
// table and the emulator refer to a kernel by them.
#define RF_ATTENTION_FORWARD(name, ...)                                                          \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, __VA_ARGS__::kBlocksPerSM) \
      name(const __grid_constant__ rfkernels::cuda::ForwardParams params) {                      \
    rfkernels::cuda::attention_forward<__VA_ARGS__>(params);                                     \
  }
