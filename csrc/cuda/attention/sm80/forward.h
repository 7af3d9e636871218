// The attention forward for sm_80 and later, by mma.sync. See forward_config.h for tiles and registers.
#pragma once
#include "../forward_rows.h"
#include "forward_config.h"
#include "mma.h"

namespace rfkernels::cuda {

// What the rows of a warp do with mma.sync: the steps of the main loop.
template <class Config>
struct MmaRows : WarpRows<Config> {
  using Base = WarpRows<Config>;
  using T = typename Config::Element;
  using QAddresses = BlockAddresses<typename Config::QTile, false>;
  using KAddresses = BlockAddresses<typename Config::KVTile, true>;
  using VAddresses = BlockAddresses<typename Config::KVTile, false>;
  using Base::kKeyUnits, Base::kRowBlocks;
  using Base::rescale, Base::rOut, Base::softmax;
  using typename Base::Scores, typename Base::Weights;

  static __device__ __forceinline__ void scores(Scores& s, const QAddresses& sQ, const KAddresses& sK) {
#pragma unroll
    for (int c = 0; c < Config::kHeadDim / 16; ++c) {
      uint32_t q[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m) ldmatrix(q[m], sQ.at(16 * m, c));
#pragma unroll
      for (int n = 0; n < kKeyUnits; n += 2) {
        uint32_t k[4];
        ldmatrix(k, sK.at(8 * n, c));
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          mma<T>(s[m][n], q[m], k[0], k[1]);
          mma<T>(s[m][n + 1], q[m], k[2], k[3]);
        }
      }
    }
  }

  // All are packed before the products with V begin: sums put off until then keep 64 registers in the way of the
  // products' operands.
  __device__ __forceinline__ void weigh(Weights& p, const Scores& s, float scale2) {
#pragma unroll
    for (int m = 0; m < kRowBlocks; ++m)
      Base::weigh(p[m], s[m], scale2, m, [&](const float (&factor)[2]) { rescale(factor, m); });
  }

  // out += p * V, sixteen keys at a time.
  __device__ __forceinline__ void accumulate(const Weights& p, const VAddresses& sV) {
#pragma unroll
    for (int n = 0; n < kKeyUnits / 2; ++n)
#pragma unroll
      for (int c = 0; c < Config::kHeadDim / 16; ++c) {
        uint32_t v[4];
        ldmatrix_transposed(v, sV.at(16 * n, c));
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          mma<T>(rOut[m][2 * c], p[m][n], v[0], v[1]);
          mma<T>(rOut[m][2 * c + 1], p[m][n], v[2], v[3]);
        }
      }
  }
};

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

template <class Config>
__device__ __forceinline__ void attention_forward(const ForwardParams& params) {
  extern __shared__ __align__(128) uint8_t shared[];
  state_shared_bytes<Config::kSharedBytes>();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(shared));
  const uint32_t sQ = base + Config::kSharedQ;
  const AttentionProblem& p = params.problem;

  const int warp_row = threadIdx.x / 32 * 16 * Config::kRowBlocks, lane = threadIdx.x % 32;
  const typename MmaRows<Config>::QAddresses q_blocks(sQ + warp_row * Config::QTile::kRowBytes, lane);
  const typename MmaRows<Config>::KAddresses k_blocks(base + Config::kSharedK, lane);
  const typename MmaRows<Config>::VAddresses v_blocks(base + Config::kSharedV, lane);
  MmaRows<Config> rows;
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
      typename MmaRows<Config>::Scores scores = {};
      rows.scores(scores, not_before(q_blocks), not_before(k_blocks));
      if (left > get_shared(sKept + kFirstFull) || left < get_shared(sKept + kLastFull)) {
        const int end = get_shared(sKept + kEnd);
        hide_unseen<Config>(scores, params, end, get_shared(sKept + kPart), end - left);
      }
      typename MmaRows<Config>::Weights weights;
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
