// Steps that the two kernels of the attention backward share. In grad_q a block owns queries and their output's
// gradients and sweeps keys and values; in grad_kv it owns keys and values and sweeps queries and gradients. Either way
//   scores = own[0] * swept[0]^T,  gradients of the weights = own[1] * swept[1]^T,
// and what is accumulated is a product of weights (or of the scores' gradients) with a swept tile.
#pragma once
#include "../async_copy.h"
#include "../backward_params.h"
#include "../ranges.h"
#include "../rotation.h"
#include "../softmax.h"
#include "../swizzle.h"
#include "mma.h"

namespace rfkernels::cuda {

template <class T, int kHeadDim_, bool kOwnsKeys>
struct BackwardConfig {
  using Element = T;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr BackwardTiles kTiles = kOwnsKeys ? grad_kv_tiles(kHeadDim) : grad_q_tiles(kHeadDim);
  static constexpr int kRowBlocks = kTiles.row_blocks, kRows = 2 * kRowBlocks;  // kRows: rows of a thread
  static constexpr int kThreads = 32 * kTiles.warps;
  static constexpr int kOwn = kTiles.own(), kSwept = kTiles.swept, kParts = kTiles.column_parts;
  static constexpr int kUnits = kSwept / 8, kColumnUnits = kHeadDim / 8 / kParts;

  using OwnTile = SharedTile<kOwn, kHeadDim>;
  using SweptTile = SharedTile<kSwept, kHeadDim>;
  static constexpr int kTermsAt = 2 * SweptTile::kBytes;  // row_terms of swept queries, behind the tiles of their stage
  static constexpr int kSharedSwept = 2 * OwnTile::kBytes, kStageBytes = kTermsAt + 8 * kSwept;
  static constexpr int kSharedBytes = kSharedSwept + 2 * kStageBytes;

  using Scores = float[kRowBlocks][kUnits][4];
  using Accumulator = float[kRowBlocks][kColumnUnits][4];

  static_assert(kHeadDim % 16 == 0 && kHeadDim <= 256 && kSwept % 16 == 0);
  static_assert(kSharedBytes == kTiles.shared_bytes(kHeadDim) && kSharedBytes <= 99 * 1024,
                "a block of sm_86 to sm_120");
  static_assert(kParts == 1 || kHeadDim / kParts % 64 == 0, "whole slabs");
};

template <class Config>
using OwnAddresses = BlockAddresses<typename Config::OwnTile, false>;
template <class Config>
using SweptAddresses = BlockAddresses<typename Config::SweptTile, false>;

// Copies `count` rows of a tensor; the tile's other rows become zeros (what lies there may be NaN). Neighbouring
// threads fill neighbouring units of a slab.
template <class Config, class Tile>
__device__ __forceinline__ void copy_rows(uint32_t tile, const char* source, int64_t step, int count) {
  constexpr int kSlabSize = Tile::kRows * Tile::kSlabUnits, kSize = kSlabSize * Tile::kSlabs;
#pragma unroll
  for (int first = 0; first < kSize; first += Config::kThreads) {
    const int i = first + threadIdx.x, slab = i / kSlabSize, row = i % kSlabSize / Tile::kSlabUnits;
    const int unit = i % Tile::kSlabUnits;
    if (kSize % Config::kThreads != 0 && slab >= Tile::kSlabs) break;
    copy_async_or_zero(tile + slab * Tile::kSlabBytes + Tile::slab_offset(row, unit),
                       source + row * step + (slab * Tile::kSlabUnits + unit) * 16, row < count);
  }
}

__device__ __forceinline__ const char* row_address(const Rows& x, int64_t sample, int64_t token, int64_t head) {
  return static_cast<const char*>(x.data) + 2 * (sample * x.batch + token * x.token + head * x.head);
}

// s += own[kWhich] * swept[kWhich]^T.
template <class Config, int kWhich>
__device__ __forceinline__ void multiply(typename Config::Scores& s, const OwnAddresses<Config>& own,
                                         const SweptAddresses<Config>& swept) {
  using T = typename Config::Element;
#pragma unroll
  for (int c = 0; c < Config::kHeadDim / 16; ++c) {
    uint32_t a[Config::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Config::kRowBlocks; ++m) ldmatrix(a[m], own.at(16 * m, c) + kWhich * Config::OwnTile::kBytes);
#pragma unroll
    for (int n = 0; n < Config::kUnits; n += 2) {
      uint32_t b[4];
      ldmatrix(b, swept.at(8 * n, c) + kWhich * Config::SweptTile::kBytes);
#pragma unroll
      for (int m = 0; m < Config::kRowBlocks; ++m) {
        mma<T>(s[m][n], a[m], b[0], b[2]);
        mma<T>(s[m][n + 1], a[m], b[1], b[3]);
      }
    }
  }
}

// sum += w * swept[kWhich], for the columns of the warp's part.
template <class Config, int kWhich>
__device__ __forceinline__ void accumulate(typename Config::Accumulator& sum, const typename Config::Scores& w,
                                           const SweptAddresses<Config>& swept, int part) {
  using T = typename Config::Element;
  using Tile = typename Config::SweptTile;
  const uint32_t offset = kWhich * Tile::kBytes + part * (Tile::kSlabs / Config::kParts * Tile::kSlabBytes);
#pragma unroll
  for (int n = 0; n < Config::kUnits; n += 2) {
    uint32_t a[Config::kRowBlocks][4];
#pragma unroll
    for (int m = 0; m < Config::kRowBlocks; ++m)
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter) {
        const float* pair = w[m][n + quarter / 2] + quarter % 2 * 2;
        a[m][quarter] = pack<T>(pair[0], pair[1]);
      }
#pragma unroll
    for (int c = 0; c < Config::kColumnUnits / 2; ++c) {
      uint32_t b[4];
      ldmatrix_transposed(b, swept.at(8 * n, c) + offset);
#pragma unroll
      for (int m = 0; m < Config::kRowBlocks; ++m) {
        mma<T>(sum[m][2 * c], a[m], b[0], b[1]);
        mma<T>(sum[m][2 * c + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Sets weights to zero outside `seen`, a range of swept rows, one per row of the thread.
template <class Config>
__device__ __forceinline__ void hide_unseen(typename Config::Scores& w, int r, const Range& seen, int first) {
  const int before = first + int(threadIdx.x % 4) * 2 - seen.begin;
  const unsigned count = max(seen.end - seen.begin, 0);
#pragma unroll
  for (int n = 0; n < Config::kUnits; ++n)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (unsigned(before + 8 * n + i) >= count) w[r / 2][n][r % 2 * 2 + i] = 0.0f;
}

// What a block accumulated, as floats in place of the tiles that it owned, where a thread finds whole pairs of a row.
template <class Config>
struct FloatTile {
  static constexpr int kSpread = Config::kHeadDim % 32 == 0 ? 1 : 2;
  uint32_t base;

  __device__ __forceinline__ uint32_t at(int row, int column) const {
    return base + row * (4 * Config::kHeadDim) +
           ((column / 4 ^ row / kSpread % (4 / kSpread) * 2) * 16 + column % 4 * 4);
  }

  template <bool kStore>
  __device__ __forceinline__ void exchange(typename Config::Accumulator& x, int warp_row, int part) const {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < Config::kRows; ++r)
#pragma unroll
      for (int n = 0; n < Config::kColumnUnits; ++n) {
        float (&pair)[4] = x[r / 2][n];
        const uint32_t address = at(warp_row + lane / 4 + 8 * r, (part * Config::kColumnUnits + n) * 8 + lane % 4 * 2);
        if constexpr (kStore)
          asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(pair[r % 2 * 2]), "f"(pair[r % 2 * 2 + 1])
                       : "memory");
        else
          asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                       : "=f"(pair[r % 2 * 2]), "=f"(pair[r % 2 * 2 + 1])
                       : "r"(address)
                       : "memory");
      }
  }

  __device__ __forceinline__ void load4(float (&x)[4], int row, int column) const {
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                 : "r"(at(row, column))
                 : "memory");
  }

  __device__ __forceinline__ void store4(const float (&x)[4], int row, int column) const {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(at(row, column)), "f"(x[0]), "f"(x[1]), "f"(x[2]),
                 "f"(x[3])
                 : "memory");
  }
};

// The rows of a float tile shared out over the block's threads, four pairs (two times four columns) at a time.
template <class Config>
struct PairWalk {
  static constexpr int kGroups = Config::kHeadDim / (2 * kPhases), kSlots = Config::kThreads / kGroups;
  int slot, first_pair, first, second;  // columns of the two fours

  __device__ __forceinline__ explicit PairWalk(bool half_split) {
    const int group = threadIdx.x % kGroups;
    slot = threadIdx.x / kGroups;  // kSlots and more: nothing to do
    first_pair = group * kPhases;
    first = half_split ? first_pair : 2 * first_pair;
    second = first + (half_split ? Config::kHeadDim / 2 : kPhases);
  }
};

// Four elements of a gradient's row.
__device__ __forceinline__ void store4(void* row, ElementType type, int column, const float (&x)[4]) {
  if (type == ElementType::kFloat32)
    *reinterpret_cast<float4*>(static_cast<float*>(row) + column) = make_float4(x[0], x[1], x[2], x[3]);
  else
    *reinterpret_cast<uint2*>(static_cast<uint16_t*>(row) + column) =
        type == ElementType::kFloat16 ? make_uint2(pack_saturated<Half>(x[0], x[1]), pack_saturated<Half>(x[2], x[3]))
                                      : make_uint2(pack<BFloat16>(x[0], x[1]), pack<BFloat16>(x[2], x[3]));
}

// Writes `count` rows of a float tile to a gradient [B, N, H, D], turned back by the phases of first_index + row.
template <class Config>
__device__ __forceinline__ void store_rows(const FloatTile<Config>& tile, void* out, ElementType type, int64_t first,
                                           int64_t heads, int count, const QueryRope& rope, bool rotated,
                                           int first_index, int first_frame, int frame_tokens) {
  const PairWalk<Config> walk(rope.half_split);
  if (walk.slot >= walk.kSlots) return;
  const int size = type == ElementType::kFloat32 ? 4 : 2;
  char* target = static_cast<char*>(out) + first * Config::kHeadDim * size;
  PhaseCache phases;
#pragma unroll 1
  for (int row = walk.slot; row < count; row += walk.kSlots) {
    float a[4], b[4];
    tile.load4(a, row, walk.first);
    tile.load4(b, row, walk.second);
    if (rotated) {
      const int index = first_index + row;
      phases.set(rope, walk.first_pair, Config::kHeadDim / 2, index / frame_tokens + first_frame, index % frame_tokens);
      phases.rotate(a, b, rope.half_split, true);
    }
    char* at = target + row * heads * Config::kHeadDim * size;
    store4(at, type, walk.first, a);
    store4(at, type, walk.second, b);
  }
}

}  // namespace rfkernels::cuda
