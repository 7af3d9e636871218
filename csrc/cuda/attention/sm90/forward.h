// The attention forward for sm_90a, by wgmma.
//
// A block owns 128 queries of one head: two warpgroups of consumers with 64 rows each. A third warpgroup copies keys
// and values by cp.async into two stages of each; mbarriers say when a stage is full and when both consumers are done
// with it, so that the consumers need not keep step and one's softmax runs beside the other's products. Within a
// consumer the softmax of a tile runs beside the product of the last tile's weights with its values.
// Registers: 168 a thread at launch. Copying needs few, so the producers hand theirs to the consumers, which hold
// (head_dim 128, 128 keys) an accumulator of 64, scores 64, and the weights of the last tile and of this one, 32 each;
// for head_dim 256, with 64 keys, 128, 32 and 16, this tile's weights in the place of the scores.
// Shared memory holds SharedTiles, whose permutation is wgmma's swizzle.
#pragma once
#include "../forward_rows.h"
#include "mbarrier.h"
#include "wgmma.h"

namespace rfkernels::cuda {

template <class T, int kHeadDim_, int kTileKeys_>
struct HopperConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_, kTileKeys = kTileKeys_;
  static constexpr ForwardTiles kTiles{kHeadDim, kTileKeys, true};
  static constexpr int kTileRows = ForwardTiles::kRows, kRowBlocks = kTiles.row_blocks(), kStages = kTiles.stages();
  static constexpr int kThreads = kTiles.owners();  // the consumers, which come first
  static constexpr int kBlockThreads = kTiles.threads();
  static constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

  using QTile = SharedTile<kTileRows, kHeadDim>;
  using KVTile = SharedTile<kTileKeys, kHeadDim>;
  struct Producers {  // what TileCopier wants to know
    using KVTile = HopperConfig::KVTile;
    static constexpr int kTileKeys = kTileKeys_, kThreads = kBlockThreads - HopperConfig::kThreads;
  };
  static constexpr int kSharedQ = 0;
  static constexpr int kSharedK = QTile::kBytes;
  static constexpr int kSharedV = kSharedK + kStages * KVTile::kBytes;
  static constexpr int kSharedBarriers = kSharedV + kStages * KVTile::kBytes;
  static constexpr int kSharedBytes = kSharedBarriers + kHopperBarrierBytes;

  static_assert(kHeadDim / 2 + kTileKeys / 2 + kTileKeys / 4 * (kHeadDim > 128 ? 1 : 2) <= 192);
  static_assert(128 * kProducerRegisters + 256 * kConsumerRegisters <= 168 * kBlockThreads);
  static_assert(kHopperBarrierBytes == 2 * 2 * 8 * kStages);
  static_assert(kSharedBytes == kTiles.shared_bytes() && kSharedBytes <= 227 * 1024, "a block of sm_90");
  static_assert(kTileKeys * KVTile::kSlabUnits % 128 == 0, "every producer copies as many units");
};

// A ring of stages of keys or of values: for each a barrier that it is full and one that it is empty.
template <class Config>
struct Ring {
  static constexpr int kBarriers = 2 * Config::kStages;
  uint32_t tiles, barriers;

  __device__ __forceinline__ Ring(uint32_t base, bool values)
      : tiles(base + (values ? Config::kSharedV : Config::kSharedK)),
        barriers(base + Config::kSharedBarriers + (values ? 8 * kBarriers : 0)) {}
  // turn: how many tiles came before.
  __device__ __forceinline__ uint32_t tile(uint32_t turn) const {
    return tiles + turn % Config::kStages * Config::KVTile::kBytes;
  }
  __device__ __forceinline__ uint32_t full(uint32_t turn) const { return barriers + turn % Config::kStages * 16; }
  __device__ __forceinline__ uint32_t empty(uint32_t turn) const { return full(turn) + 8; }
  static __device__ __forceinline__ uint32_t parity(uint32_t turn) { return turn / Config::kStages % 2; }

  __device__ __forceinline__ void initialise() const {
#pragma unroll
    for (int stage = 0; stage < Config::kStages; ++stage) {
      init_mbarrier(full(stage), Config::Producers::kThreads);
      init_mbarrier(empty(stage), Config::kThreads / 32);
    }
  }
  // Producer: when both consumers are done with what lay there.
  __device__ __forceinline__ void wait_empty(uint32_t turn) const { wait_mbarrier(empty(turn), parity(turn) ^ 1); }
  // Consumer. cp.async writes as ordinary stores do, wgmma reads by another path.
  __device__ __forceinline__ void wait_full(uint32_t turn) const {
    wait_mbarrier(full(turn), parity(turn));
    fence_async_proxy();
  }
  __device__ __forceinline__ void release(uint32_t turn) const {
    if (threadIdx.x % 32 == 0) arrive(empty(turn));
  }
};

__device__ __forceinline__ int parts(const AttentionProblem& p) { return p.use == Use::kPrefix ? 1 : 2; }

template <class Config>
__device__ __forceinline__ void produce(const ForwardParams& params, const Ring<Config>& sK, const Ring<Config>& sV) {
  using Copier = TileCopier<typename Config::Producers, Config::kThreads>;
  uint32_t turn = 0;
#pragma unroll 1
  for (int part = 0; part < parts(params.problem); ++part) {
    const QueryTile tile(params, Config::kTileRows);
    const KeySegment keys(params, tile, part, Config::kTileKeys);
    Copier copy_k(keys.k, keys.k_step), copy_v(keys.v, keys.v_step);
    const int k_step = Copier::row_step(keys.k_step), v_step = Copier::row_step(keys.v_step);
#pragma unroll 1
    for (int key = keys.begin; key < keys.end; key += Config::kTileKeys, ++turn) {
      sK.wait_empty(turn);
      copy_k.copy(sK.tile(turn), keys.end - key, k_step);
      arrive_when_copied(sK.full(turn));
      sV.wait_empty(turn);
      copy_v.copy(sV.tile(turn), keys.end - key, v_step);
      arrive_when_copied(sV.full(turn));
    }
  }
  wait_all_copies();  // no copy outlives the thread that asked for it
}

// scores = Q * K^T, committed.
template <class Config>
__device__ __forceinline__ void start_scores(float (&s)[1][Config::kTileKeys / 8][4], uint64_t q, uint32_t sK) {
  const uint64_t k = descriptor<typename Config::KVTile>(sK);
  start_products();
#pragma unroll
  for (int c = 0; c < Config::kHeadDim / 16; ++c)
    Wgmma<typename Config::Element, Config::kTileKeys>::shared(s[0], q + columns_onwards<typename Config::QTile>(c),
                                                               k + columns_onwards<typename Config::KVTile>(c), c > 0);
  commit_products();
}

// out += weights * V, committed.
template <class Config>
__device__ __forceinline__ void start_output(float (&out)[1][Config::kHeadDim / 8][4],
                                             const uint32_t (&weights)[Config::kTileKeys / 16][4], uint32_t sV) {
  const uint64_t v = descriptor<typename Config::KVTile>(sV);
  start_products();
#pragma unroll
  for (int n = 0; n < Config::kTileKeys / 16; ++n)
    Wgmma<typename Config::Element, Config::kHeadDim>::registers(out[0], weights[n],
                                                                 v + rows_onwards<typename Config::KVTile>(16 * n));
  commit_products();
}

// Weights of this tile while the product with the last tile's still reads those. They are formed before the wait for
// it, as the source says: forming them ends with a branch, for up to the start of a basic block the assembler would
// move the wait, and most exponentials would follow it. raised: as in WarpRows::weigh.
template <class Config, bool kInPlace = (Config::kHeadDim > 128)>
struct NextWeights {
  using Rows = WarpRows<Config>;
  typename Rows::Weights packed;

  template <class Raised>
  __device__ __forceinline__ void form(Rows& rows, typename Rows::Scores& s, float scale2, const Raised& raised) {
    rows.weigh(packed[0], s[0], scale2, 0, raised);
  }
  // A real move: the compiler would otherwise form the weights where the product still reads the last ones.
  __device__ __forceinline__ void take(typename Rows::Weights& weights, typename Rows::Scores&) const {
#pragma unroll
    for (int n = 0; n < Rows::kKeyUnits / 2; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        asm volatile("mov.b32 %0, %1;" : "=r"(weights[0][n][i]) : "r"(packed[0][n][i]) : "memory");
  }
};

// In the place of the scores, where the accumulator leaves no registers for both. Then nothing can be formed anew, and
// the largest score is sought first.
template <class Config>
struct NextWeights<Config, true> {
  using Rows = WarpRows<Config>;

  template <class Raised>
  __device__ __forceinline__ void form(Rows& rows, typename Rows::Scores& s, float scale2, const Raised& raised) {
    float largest[2], sums[2] = {};
    rows.find_largest(s[0], largest);
    if (rows.softmax.exceeds(largest, scale2)) {
      float factor[2];
      rows.softmax.raise(largest, scale2, factor);
      raised(factor);
    }
#pragma unroll
    for (int n = 0; n < Rows::kKeyUnits; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[0][n][i] = exp2_fast(__fmaf_rn(s[0][n][i], scale2, -rows.softmax.shift[i / 2]));
        sums[i / 2] += s[0][n][i];
      }
#pragma unroll
    for (int r = 0; r < 2; ++r) rows.softmax.total[r] += sums[r];
    if (rows.softmax.too_large(sums)) asm volatile("nanosleep.u32 0;" ::: "memory");  // for the branch alone
  }
  __device__ __forceinline__ void take(typename Rows::Weights& weights, typename Rows::Scores& s) const {
    settle(s[0]);
#pragma unroll
    for (int n = 0; n < Rows::kKeyUnits; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r)
        weights[0][n / 2][n % 2 * 2 + r] = pack<typename Config::Element>(s[0][n][2 * r], s[0][n][2 * r + 1]);
  }
};

// Of all consumers.
template <class Config>
__device__ __forceinline__ void consumer_barrier() {
  asm volatile("bar.sync 1, %0;" ::"n"(Config::kThreads) : "memory");
}

template <class Config>
__device__ __forceinline__ void consume(const ForwardParams& params, uint32_t sQ, const Ring<Config>& sK,
                                        const Ring<Config>& sV) {
  const AttentionProblem& p = params.problem;
  const int warpgroup = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // known to be the same for a warp
  const uint64_t q = descriptor<typename Config::QTile>(sQ) + rows_onwards<typename Config::QTile>(64 * warpgroup);
  // A scale of zero still has to keep what is unseen at -inf.
  const float scale2 = fmaxf(fabsf(p.scale) * kLog2E, 1e-30f);
  WarpRows<Config> rows;
  uint32_t turn = 0;
#pragma unroll 1
  for (int part = 0; part < parts(p); ++part) {
    const QueryTile tile(params, Config::kTileRows);
    const KeySegment keys(params, tile, part, Config::kTileKeys);
    if (keys.begin >= keys.end) continue;
    consumer_barrier<Config>();  // all are done with the last segment's queries
    load_queries<Config>(p, tile, sQ, part == 1 && p.use == Use::kWindow);
    fence_async_proxy();
    consumer_barrier<Config>();

    typename WarpRows<Config>::Scores scores;
    typename WarpRows<Config>::Weights weights;
    NextWeights<Config> next;
    const auto weigh = [&](int key, const auto& raised) {
      if (keys.hides(key, Config::kTileKeys)) hide_unseen<Config>(scores, params, keys.end, part, key);
      next.form(rows, scores, scale2, raised);
    };
    sK.wait_full(turn);
    start_scores<Config>(scores, q, sK.tile(turn));
    wait_products<0>(scores[0]);
    sK.release(turn);
    weigh(keys.begin, [&](const float (&factor)[2]) { rows.rescale(factor); });
    next.take(weights, scores);
#pragma unroll 1
    for (int key = keys.begin + Config::kTileKeys; key < keys.end; key += Config::kTileKeys, ++turn) {
      sK.wait_full(turn + 1);
      start_scores<Config>(scores, q, sK.tile(turn + 1));
      // Its values are there too: an arrival stands for all copies that its thread issued before.
      start_output<Config>(rows.rOut, weights[0], sV.tile(turn));
      wait_products<1>(scores[0]);
      sK.release(turn + 1);
      weigh(key, [&](const float (&factor)[2]) {
        wait_products<0>(rows.rOut[0]);  // seldom, so it may cost the overlap
        rows.rescale(factor);
      });
      wait_products<0>(rows.rOut[0]);
      sV.release(turn);
      next.take(weights, scores);
    }
    sV.wait_full(turn);
    start_output<Config>(rows.rOut, weights[0], sV.tile(turn));
    wait_products<0>(rows.rOut[0]);
    sV.release(turn++);
  }
  rows.softmax.finish();
  consumer_barrier<Config>();  // rows of the output take the place of the queries
  store(rows, params, sQ);
}

template <class Config>
__device__ __forceinline__ void attention_forward_hopper(const ForwardParams& params) {
  extern __shared__ __align__(1024) uint8_t tiles[];  // wgmma's swizzle counts from multiples of 1024
  state_shared_bytes<Config::kSharedBytes>();
  const uint32_t base = uint32_t(__cvta_generic_to_shared(tiles));
  const Ring<Config> sK(base, false), sV(base, true);
  if (threadIdx.x == 0) {
    sK.initialise();
    sV.initialise();
  }
  __syncthreads();
  if (threadIdx.x >= Config::kThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Config::kProducerRegisters));
    produce(params, sK, sV);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Config::kConsumerRegisters));
    consume(params, base + Config::kSharedQ, sK, sV);
  }
}

}  // namespace rfkernels::cuda

#define RF_ATTENTION_FORWARD_HOPPER(name, ...)                                \
  extern "C" __global__ void __launch_bounds__(__VA_ARGS__::kBlockThreads, 1) \
      name(const __grid_constant__ rfkernels::cuda::ForwardParams params) {   \
    rfkernels::cuda::attention_forward_hopper<__VA_ARGS__>(params);           \
  }
