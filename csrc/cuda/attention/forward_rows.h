// The rows of one warp in the attention forward, whatever multiplies them: accumulator, softmax state, mask and output.
#pragma once
#include "forward_steps.h"
#include "softmax.h"

namespace rfkernels::cuda {

template <class Config>
struct WarpRows {
  static constexpr int kRowBlocks = Config::kRowBlocks, kRows = 2 * kRowBlocks;  // kRows: rows of a thread
  static constexpr int kKeyUnits = Config::kTileKeys / 8, kColumnUnits = Config::kHeadDim / 8;
  using T = typename Config::Element;
  using Scores = float[kRowBlocks][kKeyUnits][4];
  using Weights = uint32_t[kRowBlocks][kKeyUnits / 2][4];  // packed: an `a` of mma for every sixteen keys

  float rOut[kRowBlocks][kColumnUnits][4] = {};
  SoftmaxState<kRows> softmax;

  // Of this thread's scores in a row block, per row.
  static __device__ __forceinline__ void find_largest(const float (&s)[kKeyUnits][4], float (&largest)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      largest[r] = fmaxf(s[0][2 * r], s[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < kKeyUnits; ++n) largest[r] = fmaxf(largest[r], fmaxf(s[n][2 * r], s[n][2 * r + 1]));
    }
  }

  // The weights of a row block, rounded, and what a thread's part of each row sums to.
  __device__ __forceinline__ void exponentiate(uint32_t (&p)[kKeyUnits / 2][4], float (&sums)[2],
                                               const float (&s)[kKeyUnits][4], float scale2, int m) const {
    sums[0] = sums[1] = 0.0f;
#pragma unroll
    for (int n = 0; n < kKeyUnits; ++n)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float low = exp2_fast(__fmaf_rn(s[n][2 * r], scale2, -softmax.shift[2 * m + r]));
        const float high = exp2_fast(__fmaf_rn(s[n][2 * r + 1], scale2, -softmax.shift[2 * m + r]));
        sums[r] += low;
        sums[r] += high;
        p[n / 2][n % 2 * 2 + r] = pack<T>(low, high);
      }
  }

  // Weights of a row block's new scores. A maximum is sought only where weights come out too large, seldom after the
  // first tile: then the shift is raised and the weights are formed anew. (A thread sums at most 32 weights of a row,
  // so where they exceed 256 one is more than 8, and a shift grows by 3 or more.) raised(factor): is called then, for
  // what was summed must be multiplied. Returns whether it was.
  template <class Raised>
  __device__ __forceinline__ bool weigh(uint32_t (&p)[kKeyUnits / 2][4], const float (&s)[kKeyUnits][4], float scale2,
                                        int m, const Raised& raised) {
    static_assert(2 * kKeyUnits <= 32);
    float sums[2];
    exponentiate(p, sums, s, scale2, m);
    const bool too_large = softmax.too_large(sums);
    if (too_large) {
      float largest[2], factor[2];
      find_largest(s, largest);
      softmax.raise(largest, scale2, factor, 2 * m);
      raised(factor);
      exponentiate(p, sums, s, scale2, m);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) softmax.total[2 * m + r] += sums[r];
    return too_large;
  }

  // Multiplies what a row block has summed.
  __device__ __forceinline__ void rescale(const float (&factor)[2], int m = 0) {
#pragma unroll
    for (int n = 0; n < kColumnUnits; ++n)
#pragma unroll
      for (int i = 0; i < 4; ++i) rOut[m][n][i] *= factor[i / 2];
  }
};

// Sets scores of keys that a row does not see to -inf: tiles at the edge of a segment only.
template <class Config, class Scores>
__device__ __forceinline__ void hide_unseen(Scores& s, const ForwardParams& params, int end, int part, int first_key) {
  const AttentionProblem& p = params.problem;
  const int thread = not_before(threadIdx.x), block = TileShare(params).index % params.row_blocks;
  const int row = block * Config::kTileRows + thread / 32 * 16 * Config::kRowBlocks + thread % 32 / 4;
#pragma unroll
  for (int r = 0; r < 2 * Config::kRowBlocks; ++r) {
    const Range seen = keys_of_row(p, part, row + 8 * r, 0, end);
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

// A part in float, as it lies in registers; or whole rows of the output, by way of shared memory: 16 bytes a thread. Of
// the queries' tile a warp uses only the rows that it alone reads, so no barrier is needed.
template <class Config>
__device__ __forceinline__ void store(const WarpRows<Config>& rows, const ForwardParams& params, uint32_t sQ) {
  using T = typename Config::Element;
  using QTile = typename Config::QTile;
  const AttentionProblem& p = params.problem;
  const QueryTile tile(params, Config::kTileRows);
  const int thread = not_before(threadIdx.x), lane = thread % 32, warp_row = thread / 32 * 16 * Config::kRowBlocks;
  const bool is_part = tile.shares > 1;
  const int64_t part = int64_t(not_before(blockIdx.x) - params.whole) * Config::kTileRows;
#pragma unroll
  for (int r = 0; r < 2 * Config::kRowBlocks; ++r) {
    const int local = warp_row + lane / 4 + 8 * r, row = tile.first_row + local;
    const bool exists = row >= tile.stream.missing;
    const float normaliser = exists ? rows.softmax.normaliser(r) : 0.0f;
    float* lse = is_part ? params.part_lse + part + local
                         : params.lse + (int64_t(tile.sample) * p.heads + tile.head) * p.queries + row;
    if (lane % 4 == 0 && (is_part || row <= tile.last_row)) *lse = exists ? rows.softmax.lse(r) : kUnseen;
    const auto value = [&](int n, int i) { return exists ? rows.rOut[r / 2][n][r % 2 * 2 + i] * normaliser : 0.0f; };
    if (is_part) {
      float* out = params.parts + (part + local) * Config::kHeadDim;
#pragma unroll
      for (int n = 0; n < Config::kHeadDim / 8; ++n)
        *reinterpret_cast<float2*>(out + 8 * n + lane % 4 * 2) = make_float2(value(n, 0), value(n, 1));
    } else {
#pragma unroll
      for (int n = 0; n < Config::kHeadDim / 8; ++n)
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(sQ + QTile::offset(local, n) + lane % 4 * 4),
                     "r"(pack<T>(value(n, 0), value(n, 1)))
                     : "memory");
    }
  }
  if (is_part) return;
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
    T* out = static_cast<T*>(params.out) +
             ((int64_t(tile.sample) * p.queries + row) * p.heads + tile.head) * Config::kHeadDim;
    reinterpret_cast<uint4*>(out)[unit] = bits;
  }
}

}  // namespace rfkernels::cuda
