// The kernel of the attention forward, step by step; the steps are in attention_forward.h.
#pragma once
#include "attention_forward.h"

namespace rfkernels::cuda {

// Sets scores of keys that a row does not see to -inf: tiles at the edge of a segment only.
template <class Config, class Scores>
__device__ __forceinline__ void hide_unseen(Scores& s, const ForwardParams& params, const QueryTile& tile,
                                            const KeySegment& keys, int part, int row, int first_key) {
  const AttentionProblem& p = params.problem;
#pragma unroll
  for (int r = 0; r < 2 * Config::kRowBlocks; ++r) {
    Range seen = {keys.begin, keys.limit};
    if (p.use == Use::kWindow)
      seen = visible_keys(p.mask, min(row + 8 * r, tile.last_row) + tile.offset, part == 1, p.keys);
    const int before = first_key + int(threadIdx.x % 4) * 2 - seen.begin;
    const unsigned count = max(seen.end - seen.begin, 0);
#pragma unroll
    for (int n = 0; n < Config::kTileKeys / 8; ++n)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (unsigned(before + 8 * n + i) >= count) s[r / 2][n][r % 2 * 2 + i] = kUnseen;
  }
}

// Whole rows of the output, by way of shared memory: 16 bytes a thread. Of the queries' tile a warp uses only the rows
// that it alone reads, so no barrier is needed.
template <class Config>
__device__ __forceinline__ void store(const WarpRows<Config>& rows, const ForwardParams& params, const QueryTile& tile,
                                      uint32_t sQ, int warp_row) {
  using T = typename Config::Element;
  using QTile = typename Config::QTile;
  const AttentionProblem& p = params.problem;
  const int lane = threadIdx.x % 32;
  const int64_t place = int64_t(tile.split) * p.batch + tile.sample;
#pragma unroll
  for (int r = 0; r < 2 * Config::kRowBlocks; ++r) {
    const int local = warp_row + lane / 4 + 8 * r, row = tile.first_row + local;
    const bool exists = row >= tile.missing;
    const float normaliser = exists ? rows.softmax.normaliser(r) : 0.0f;
    if (lane % 4 == 0 && row <= tile.last_row)
      params.lse[(place * p.heads + tile.head) * p.queries + row] = exists ? rows.softmax.lse(r) : kUnseen;
    float* part = static_cast<float*>(params.out) + ((place * p.queries + row) * p.heads + tile.head) * Config::kHeadDim;
#pragma unroll
    for (int n = 0; n < Config::kHeadDim / 8; ++n) {
      float low = rows.rOut[r / 2][n][r % 2 * 2], high = rows.rOut[r / 2][n][r % 2 * 2 + 1];
      low = exists ? low * normaliser : 0.0f, high = exists ? high * normaliser : 0.0f;
      if (params.splits > 1) {
        if (row <= tile.last_row) *reinterpret_cast<float2*>(part + 8 * n + lane % 4 * 2) = make_float2(low, high);
      } else {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(sQ + QTile::offset(local, n) + lane % 4 * 4), "r"(pack<T>(low, high))
                     : "memory");
      }
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
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t sQ = base + Config::kSharedQ;
  const AttentionProblem& p = params.problem;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * Config::kRowBlocks;
  const QueryTile tile(params, Config::kTileRows);
  // A scale of zero still has to keep what is unseen at -inf.
  const float scale2 = fmaxf(fabsf(p.scale) * kLog2E, 1e-30f);

  const BlockAddresses<typename Config::QTile> q_blocks(sQ + warp_row * Config::QTile::kRowBytes, lane);
  const BlockAddresses<typename Config::KVTile> k_blocks(base + Config::kSharedK, lane);
  const BlockAddresses<typename Config::KVTile> v_blocks(base + Config::kSharedV, lane);
  WarpRows<Config> rows;

  const int parts = p.use == Use::kPrefix ? 1 : 2;
#pragma unroll 1
  for (int part = 0; part < parts; ++part) {
    const KeySegment keys(params, tile, part, Config::kTileKeys);
    if (keys.begin >= keys.end) continue;
    // Sinks outside the window meet the queries in another rotation. Without a rope that turn changes nothing.
    const bool for_sinks = part == 1 && p.use == Use::kWindow;
    if (part > 0) __syncthreads();  // every warp is done with the last segment
    TileCopier<Config> copy_k(keys.k, keys.k_step, base + Config::kSharedK);
    TileCopier<Config> copy_v(keys.v, keys.v_step, base + Config::kSharedV);
    copy_k.copy(keys.limit - keys.begin);
    load_queries<Config>(p, tile, sQ, for_sinks);
#pragma unroll 1
    for (int key = keys.begin; key < keys.end; key += Config::kTileKeys) {
      wait_copies<0>();
      __syncthreads();  // keys (and queries) are there; every warp is done with the last values
      copy_v.copy(keys.limit - key);
      float scores[Config::kRowBlocks][Config::kTileKeys / 8][4] = {};
      rows.scores(scores, q_blocks, k_blocks);
      if (key < keys.full_begin || key + Config::kTileKeys > keys.full_end)
        hide_unseen<Config>(scores, params, tile, keys, part, tile.first_row + warp_row + lane / 4, key);
      rows.raise(scores, scale2);
      wait_copies<0>();
      __syncthreads();  // values are there; every warp is done with the keys
      if (key + Config::kTileKeys < keys.end) copy_k.copy(keys.limit - key - Config::kTileKeys);
      rows.accumulate(scores, v_blocks, scale2);
    }
  }
  rows.softmax.finish();
  store(rows, params, tile, sQ, warp_row);
}

}  // namespace rfkernels::cuda

// One entry per head size and type, in a file of its own so that they compile side by side. Readable names: the host's
// table and the emulator refer to a kernel by them.
#define RF_ATTENTION_FORWARD(name, ...)                                                         \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kThreads, __VA_ARGS__::kBlocksPerSM) \
      name(const __grid_constant__ rfkernels::cuda::ForwardParams params) {                     \
    rfkernels::cuda::attention_forward<__VA_ARGS__>(params);                                    \
  }
