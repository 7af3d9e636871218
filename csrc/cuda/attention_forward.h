// Attention forward for sm_80 and later: one kernel for the cache's prefix, for past and open chunk, and for the
// sink-window mask. See attention_forward_config.h for tiles and registers.
#pragma once
#include "async_copy.h"
#include "attention_forward_config.h"
#include "attention_params.h"
#include "mask.h"
#include "mma.h"
#include "rotation.h"
#include "softmax.h"

namespace rfkernels::cuda {

// The row tile of a block, and what is known of its stream.
struct QueryTile {
  int sample, head, split;
  int first_row, last_row;  // last_row: the last that exists
  int offset;               // kWindow: row + offset is a query's index among the keys
  int missing;              // rows before this one belong to frames that the stream does not have
  int past_tokens;          // tokens of k that are seen (kPrefix, kChunk)
  int first_frame;          // of row 0; kWindow: 0, frames count from the first key

  __device__ QueryTile(const ForwardParams& params, int rows) {
    const AttentionProblem& p = params.problem;
    const int block = blockIdx.x % params.row_blocks, rest = blockIdx.x / params.row_blocks;
    head = rest % p.heads;
    sample = rest / p.heads;
    split = blockIdx.y;
    first_row = block * rows;
    last_row = min(first_row + rows, p.queries) - 1;
    offset = missing = past_tokens = first_frame = 0;
    if (p.use == Use::kWindow) {
      offset = p.keys - p.queries;
    } else {
      const int tokens = int(p.frame_tokens), frames = p.queries / tokens;
      const int num_frames = int(p.num_frames[sample]);
      missing = max(frames - num_frames, 0) * tokens;
      first_frame = num_frames - frames;
      const int valid = min(num_frames, int(p.capacity)) - (p.use == Use::kChunk ? frames : 0);
      past_tokens = max(valid, 0) * tokens;
    }
  }
};

// One contiguous range of keys that a tile of queries sweeps.
struct KeySegment {
  const char *k, *v;         // token `begin`
  int64_t k_step, v_step;    // bytes from token to token
  int begin, end;            // of this block's share
  int full_begin, full_end;  // between these every row sees every key
  int limit;                 // no key exists (or is seen) from here on

  // part 0: the prefix, the past, or the window; part 1: the open chunk's own keys, or sinks outside the window.
  __device__ KeySegment(const ForwardParams& params, const QueryTile& tile, int part, int tile_keys) {
    const AttentionProblem& p = params.problem;
    const bool own = p.use == Use::kChunk && part == 1;
    const Rows& rk = own ? p.own_k : p.k;
    const Rows& rv = own ? p.own_v : p.v;
    if (p.use == Use::kWindow) {
      const Range first = visible_keys(p.mask, tile.first_row + tile.offset, part == 1, p.keys);
      const Range last = visible_keys(p.mask, tile.last_row + tile.offset, part == 1, p.keys);
      begin = first.begin, end = last.end;
      full_begin = last.begin, full_end = first.end;
    } else {
      begin = own ? tile.missing : 0;
      end = own ? p.queries : tile.past_tokens;
      if (tile.last_row < tile.missing) end = begin;  // nobody here to attend
      full_begin = begin, full_end = end;
    }
    end = max(end, begin);
    limit = end;
    if (params.splits > 1) {  // whole tiles for every share but the last
      const int tiles = (end - begin + tile_keys - 1) / tile_keys;
      const int share = (tiles + params.splits - 1) / params.splits * tile_keys;
      begin = min(begin + tile.split * share, end);
      end = min(begin + share, end);
    }
    k_step = 2 * rk.token, v_step = 2 * rv.token;
    const int64_t kv_head = tile.head / (p.heads / p.kv_heads);
    k = static_cast<const char*>(rk.data) + 2 * (tile.sample * rk.batch + kv_head * rk.head) + begin * k_step;
    v = static_cast<const char*>(rv.data) + 2 * (tile.sample * rv.batch + kv_head * rv.head) + begin * v_step;
  }
};

// Copies the tiles of K or V one after another: each thread a unit of every kRowStep-th row, in every slab.
template <class Config>
struct TileCopier {
  using Tile = typename Config::KVTile;
  static constexpr int kRowStep = Config::kThreads / Tile::kSlabUnits;
  const char* source;
  int64_t step;  // bytes between the rows of a thread
  uint32_t destination;

  __device__ __forceinline__ TileCopier(const char* first, int64_t token_step, uint32_t tile) {
    const int row = threadIdx.x / Tile::kSlabUnits, unit = threadIdx.x % Tile::kSlabUnits;
    source = first + row * token_step + unit * 16;
    step = token_step * kRowStep;
    destination = tile + Tile::slab_offset(row, unit);
  }

  // rows: how many of the tile exist; the others become zeros (what lies there may be NaN).
  __device__ __forceinline__ void copy(int rows) {
    if (rows >= Config::kTileKeys) {
#pragma unroll
      for (int r = 0; r < Config::kTileKeys; r += kRowStep, source += step)
#pragma unroll
        for (int slab = 0; slab < Tile::kSlabs; ++slab)
          copy_async(destination + r * Tile::kRowBytes + slab * Tile::kSlabBytes, source + slab * Tile::kRowBytes);
    } else {
      int left = rows - int(threadIdx.x / Tile::kSlabUnits);
#pragma unroll
      for (int r = 0; r < Config::kTileKeys; r += kRowStep, source += step)
#pragma unroll
        for (int slab = 0; slab < Tile::kSlabs; ++slab)
          copy_async_or_zero(destination + r * Tile::kRowBytes + slab * Tile::kSlabBytes,
                             source + slab * Tile::kRowBytes, r < left);
    }
    commit_copies();
  }
};

// Queries to shared memory: read once, rotated at their frame (less `evicted` ones for sinks outside the window), rounded.
template <class Config>
__device__ __forceinline__ void load_queries(const AttentionProblem& p, const QueryTile& tile, uint32_t sQ,
                                             bool for_sinks) {
  using T = typename Config::Element;
  constexpr int kGroups = Config::kHeadDim / 16;  // of eight pairs
  constexpr int kSlots = Config::kThreads / kGroups, kPairs = Config::kHeadDim / 2;
  const int group = threadIdx.x % kGroups, slot = threadIdx.x / kGroups;
  if (slot >= kSlots) return;
  const bool half_split = p.rope.half_split;
  const int first = half_split ? group * 8 : group * 16;  // columns of the two units
  const int second = half_split ? first + kPairs : first + 8;
  const float sign = p.scale < 0.0f ? -1.0f : 1.0f;  // the running maximum needs a positive scale
  const int tokens = int(p.frame_tokens), size = p.q_type == ElementType::kFloat32 ? 4 : 2;
  const char* q = static_cast<const char*>(p.q.data) + size * (tile.sample * p.q.batch + tile.head * p.q.head);
  PhaseCache phases;
#pragma unroll 1
  for (int row = slot; row < Config::kTileRows; row += kSlots) {
    const int known = min(tile.first_row + row, tile.last_row);  // rows past the end repeat the last
    float a[8], b[8];
    const char* source = q + size * (known * p.q.token);
    load8(a, source, p.q_type, first);
    load8(b, source, p.q_type, second);
    if (p.rope.frame_turns != nullptr) {
      const int index = known + tile.offset;
      int frame = index / tokens + tile.first_frame;
      if (for_sinks) frame -= evicted_frames(p.mask, index, tokens);
      phases.set(p.rope, group * 8, kPairs, frame, index % tokens);
      if (half_split) {
        phases.rotate(a, b);
      } else {
        float even[8], odd[8];
#pragma unroll
        for (int i = 0; i < 4; ++i) even[i] = a[2 * i], odd[i] = a[2 * i + 1], even[i + 4] = b[2 * i], odd[i + 4] = b[2 * i + 1];
        phases.rotate(even, odd);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[2 * i] = even[i], a[2 * i + 1] = odd[i], b[2 * i] = even[i + 4], b[2 * i + 1] = odd[i + 4];
      }
    }
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      const float(&x)[8] = part == 0 ? a : b;
      uint32_t bits[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i] = pack_saturated<T>(sign * x[2 * i], sign * x[2 * i + 1]);
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                       sQ + Config::QTile::offset(row, (part == 0 ? first : second) / 8)),
                   "r"(bits[0]), "r"(bits[1]), "r"(bits[2]), "r"(bits[3])
                   : "memory");
    }
  }
}

// The rows of one warp: accumulator and softmax state, and the steps of the main loop.
template <class Config>
struct WarpRows {
  using T = typename Config::Element;
  static constexpr int kRowBlocks = Config::kRowBlocks, kRows = 2 * kRowBlocks;  // rows of a thread
  static constexpr int kKeyUnits = Config::kTileKeys / 8, kColumnUnits = Config::kHeadDim / 8;

  float rOut[kRowBlocks][kColumnUnits][4] = {};
  SoftmaxState<kRows> softmax;

  static __device__ __forceinline__ void scores(float (&s)[kRowBlocks][kKeyUnits][4],
                                                const BlockAddresses<typename Config::QTile>& sQ,
                                                const BlockAddresses<typename Config::KVTile>& sK) {
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
          mma<T>(s[m][n], q[m], k[0], k[2]);
          mma<T>(s[m][n + 1], q[m], k[1], k[3]);
        }
      }
    }
  }

  // Raises the softmax's shift where the new scores ask for it: seldom, after the first tile.
  __device__ __forceinline__ void raise(const float (&s)[kRowBlocks][kKeyUnits][4], float scale2) {
    float largest[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      largest[r] = s[r / 2][0][r % 2 * 2];
#pragma unroll
      for (int n = 0; n < kKeyUnits; ++n)
#pragma unroll
        for (int i = n == 0; i < 2; ++i) largest[r] = fmaxf(largest[r], s[r / 2][n][r % 2 * 2 + i]);
    }
    if (softmax.exceeds(largest, scale2)) {
      float factor[kRows];
      softmax.raise(largest, scale2, factor);
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m)
#pragma unroll
        for (int n = 0; n < kColumnUnits; ++n)
#pragma unroll
          for (int i = 0; i < 4; ++i) rOut[m][n][i] *= factor[2 * m + i / 2];
    }
  }

  // out += exp2(s) * V, sixteen keys at a time.
  __device__ __forceinline__ void accumulate(const float (&s)[kRowBlocks][kKeyUnits][4],
                                             const BlockAddresses<typename Config::KVTile>& sV, float scale2) {
#pragma unroll
    for (int n = 0; n < kKeyUnits; n += 2) {
      uint32_t p[kRowBlocks][4];
#pragma unroll
      for (int m = 0; m < kRowBlocks; ++m)
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
          const int r = 2 * m + quarter % 2;
          const float* pair = s[m][n + quarter / 2] + quarter % 2 * 2;
          const float low = exp2_fast(__fmaf_rn(pair[0], scale2, -softmax.shift[r]));
          const float high = exp2_fast(__fmaf_rn(pair[1], scale2, -softmax.shift[r]));
          softmax.total[r] += low;
          softmax.total[r] += high;
          p[m][quarter] = pack<T>(low, high);
        }
#pragma unroll
      for (int c = 0; c < Config::kHeadDim / 16; ++c) {
        uint32_t v[4];
        ldmatrix_transposed(v, sV.at(8 * n, c));
#pragma unroll
        for (int m = 0; m < kRowBlocks; ++m) {
          mma<T>(rOut[m][2 * c], p[m], v[0], v[1]);
          mma<T>(rOut[m][2 * c + 1], p[m], v[2], v[3]);
        }
      }
    }
  }
};

}  // namespace rfkernels::cuda
