// Steps of the attention forward that every architecture's kernel takes: which queries and keys a block owns, copying
// keys and values, loading queries. One kernel serves the cache's prefix, past and open chunk, and the sink-window
// mask.
#pragma once
#include "../element.h"
#include "async_copy.h"
#include "params.h"
#include "ranges.h"
#include "rotation.h"
#include "swizzle.h"

namespace rfkernels::cuda {

// x, but nothing that depends on it may be computed before this point: the compiler would otherwise move what is
// constant out of the loop and keep it in registers that the loop has no room for.
__device__ __forceinline__ int not_before(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

template <class Tile, bool kByRows>
__device__ __forceinline__ BlockAddresses<Tile, kByRows> not_before(BlockAddresses<Tile, kByRows> x) {
  x.first = not_before(int(x.first));
  return x;
}

// Which tile of queries a block has, and which share of its keys.
struct TileShare {
  int index, share = 0, shares = 1;

  __device__ explicit TileShare(const ForwardParams& params) : index(not_before(blockIdx.x)) {
    const int part = index - params.whole;
    if (part >= 0) {
      shares = params.shares;
      index = part / shares;
      share = part - index * shares;
      index += params.whole;
    }
  }
};

// The row tile of a block, and what is known of its stream. Cheap to make anew, dear to keep across the main loop.
struct QueryTile : TileShare {
  int sample, head;
  int first_row, last_row;  // last_row: the last that exists
  StreamRows stream;

  __device__ QueryTile(const ForwardParams& params, int rows) : TileShare(params) {
    const AttentionProblem& p = params.problem;
    const int block = index % params.row_blocks, rest = index / params.row_blocks;
    head = rest % p.heads;
    sample = rest / p.heads;
    first_row = block * rows;
    last_row = min(first_row + rows, p.queries) - 1;
    stream = StreamRows(p, sample);
  }
};

// One contiguous range of keys that a tile of queries sweeps.
struct KeySegment : Sweep {  // begin, end: of this block's share, whole tiles but for the last tile of the last share
  const char *k, *v;         // token `begin`
  int64_t k_step, v_step;    // bytes from token to token

  // part 0: the prefix, the past, or the window; part 1: the open chunk's own keys, or sinks outside the window.
  __device__ KeySegment(const ForwardParams& params, const QueryTile& tile, int part, int tile_keys)
      : Sweep(swept_keys(params.problem, tile.stream, part, tile.first_row, tile.last_row)) {
    const AttentionProblem& p = params.problem;
    const bool own = p.use == Use::kChunk && part == 1;
    const Rows& rk = own ? p.own_k : p.k;
    const Rows& rv = own ? p.own_v : p.v;
    end = max(end, begin);
    if (tile.shares > 1) {
      const int tiles = (end - begin + tile_keys - 1) / tile_keys;
      const int share = (tiles + tile.shares - 1) / tile.shares * tile_keys;
      begin = min(begin + tile.share * share, end);
      end = min(begin + share, end);
    }
    k_step = 2 * rk.token, v_step = 2 * rv.token;
    const int64_t kv_head = tile.head * p.kv_heads / p.heads;  // one division, and none to keep
    k = static_cast<const char*>(rk.data) + 2 * (tile.sample * rk.batch + kv_head * rk.head) + begin * k_step;
    v = static_cast<const char*>(rv.data) + 2 * (tile.sample * rv.batch + kv_head * rv.head) + begin * v_step;
  }
};

// Copies the tiles of K or V one after another: each thread a unit of every kRowStep-th row, in every slab. kFirst: the
// first of the kThreads threads that copy.
template <class Config, int kFirst = 0>
struct TileCopier {
  using Tile = typename Config::KVTile;
  static constexpr int kRowStep = Config::kThreads / Tile::kSlabUnits, kCopies = Config::kTileKeys / kRowStep;
  const char* source;
  uint32_t place;  // of this thread's first unit in a tile

  __device__ __forceinline__ TileCopier(const char* first, int64_t token_step) {
    const unsigned thread = threadIdx.x - kFirst, row = thread / Tile::kSlabUnits, unit = thread % Tile::kSlabUnits;
    source = first + row * token_step + unit * 16;
    place = Tile::slab_offset(row, unit);
  }

  // Bytes between the rows of a thread: 32 bits, so that an advance is one instruction.
  static __device__ __forceinline__ int row_step(int64_t token_step) { return int(token_step) * kRowStep; }

  // rows: how many of the tile exist; the others become zeros (what lies there may be NaN).
  __device__ __forceinline__ void copy(uint32_t tile, int rows, int step) {
    const uint32_t destination = tile + place;
    if (rows >= Config::kTileKeys) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i)
#pragma unroll
        for (int slab = 0; slab < Tile::kSlabs; ++slab)
          copy_async(destination + i * kRowStep * Tile::kRowBytes + slab * Tile::kSlabBytes,
                     source + i * int64_t(step) + slab * Tile::kRowBytes);
    } else {
      const int left = rows - int(not_before(threadIdx.x) - kFirst) / Tile::kSlabUnits;
#pragma unroll 1  // a loop stays out of the way of the other branch, where straight code would be predicated into it
      for (int i = 0; i < kCopies; ++i)
#pragma unroll
        for (int slab = 0; slab < Tile::kSlabs; ++slab)
          copy_async_or_zero(destination + i * kRowStep * Tile::kRowBytes + slab * Tile::kSlabBytes,
                             source + i * int64_t(step) + slab * Tile::kRowBytes, i * kRowStep < left);
    }
    source += kCopies * int64_t(step);
    commit_copies();
  }
};

template <class T>
__device__ __forceinline__ void store4(uint32_t shared, const float (&x)[4], float sign) {
  const uint32_t low = pack_saturated<T>(sign * x[0], sign * x[1]), high = pack_saturated<T>(sign * x[2], sign * x[3]);
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(shared), "r"(low), "r"(high) : "memory");
}

// Queries to shared memory: read once, rotated at their frame (less `evicted` ones for sinks outside the window),
// rounded.
template <class Config>
__device__ __forceinline__ void load_queries(const AttentionProblem& p, const QueryTile& tile, uint32_t sQ,
                                             bool for_sinks) {
  using T = typename Config::Element;
  constexpr int kPairs = Config::kHeadDim / 2, kGroups = kPairs / kPhases;
  constexpr int kSlots = Config::kThreads / kGroups;
  const int thread = not_before(threadIdx.x), group = thread % kGroups, slot = thread / kGroups;
  if (slot >= kSlots) return;
  const bool half_split = p.rope.half_split;
  const int first = half_split ? group * kPhases : 2 * group * kPhases;  // columns of the pairs' halves
  const int second = first + (half_split ? kPairs : kPhases);
  const float sign = p.scale < 0.0f ? -1.0f : 1.0f;  // the running maximum needs a positive scale
  const int tokens = int(p.frame_tokens), size = p.q_type == ElementType::kFloat32 ? 4 : 2;
  const char* q = static_cast<const char*>(p.q.data) + size * (tile.sample * p.q.batch + tile.head * p.q.head);
  PhaseCache phases;
#pragma unroll 1
  for (int row = slot; row < Config::kTileRows; row += kSlots) {
    const int known = min(tile.first_row + row, tile.last_row);  // rows past the end repeat the last
    const char* source = q + size * (known * p.q.token);
    float a[kPhases], b[kPhases];
    load4(a, source + size * first, p.q_type);
    load4(b, source + size * second, p.q_type);
    if (p.rope.frame_turns != nullptr) {
      const int index = known + tile.stream.offset;
      int frame = index / tokens + tile.stream.first_frame;
      if (for_sinks) frame -= evicted_frames(p.mask, index, tokens);
      phases.set(p.rope, group * kPhases, kPairs, frame, index % tokens);
      phases.rotate(a, b, half_split);
    }
    store4<T>(sQ + Config::QTile::offset(row, first / 8) + first % 8 * 2, a, sign);
    store4<T>(sQ + Config::QTile::offset(row, second / 8) + second % 8 * 2, b, sign);
  }
}

}  // namespace rfkernels::cuda
