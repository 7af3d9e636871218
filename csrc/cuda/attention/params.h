// What the host hands to the attention kernels: plain structs of fixed-size fields, one `const __grid_constant__`
// parameter per kernel. No torch header: the host, the kernels and the tests' ctypes mirror share this layout.
#pragma once
#include <cstdint>

#include "../../geometry.h"

namespace rfkernels::cuda {

enum class ElementType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// Which keys a query sees.
enum class Use : int32_t {
  kPrefix = 0,  // the first min(num_frames, capacity) frames of k
  kChunk = 1,   // those but for the open frames, then own_k, the open chunk's own
  kWindow = 2,  // full sequence under `mask`: query row i is token keys - queries + i
};

// A [B, N, H, D] tensor: unit last stride, the others in elements. Every row starts at a multiple of 16 bytes (the host
// copies a tensor for which that does not hold); tokens of k and v are less than 2**24 elements apart.
struct Rows {
  void* data;
  int64_t batch, token, head;
};

// Rotation of queries (keys come rotated). frame_turns: double [frame_pairs], turns per frame; null: no rotation.
// spatial: float [frame_tokens, D / 2 - frame_pairs, 2], cos and sin.
struct QueryRope {
  const double* frame_turns;
  const float* spatial;
  int32_t frame_pairs;
  int32_t half_split;  // pairs are (i, i + D / 2) instead of (2i, 2i + 1)
};

constexpr int64_t kFarthestTokens = int64_t(1) << 24;  // elements: a tile then stays within 2**31 bytes
constexpr int kForwardKeptBytes = 32;                  // of shared memory, beside the tiles
constexpr int kHopperBarrierBytes = 64;                // the same of the kernels for sm_90a: eight mbarriers

// One attention problem, forward or backward. Token counts are below 2**31; k, v and out share one half type.
struct AttentionProblem {
  Rows q;                     // of q_type, un-rotated where there is a rope
  Rows k, v;                  // kPrefix: a layer of the cache; kChunk: the past frames; kWindow: the sequence
  Rows own_k, own_v;          // kChunk: the open chunk's keys (rotated) and values, `queries` tokens
  const int64_t* num_frames;  // [B], the open frames included; kWindow: not read
  QueryRope rope;
  WindowMask mask;               // kWindow only
  int64_t frame_tokens;          // kPrefix, kChunk: tokens of a frame; kWindow: of the rope's table, 1 without a rope
  int64_t capacity;              // frames that the cache holds (kPrefix, kChunk)
  int32_t batch, queries, keys;  // keys: tokens of k (kWindow), else not read
  int32_t heads, kv_heads;       // kv_heads divides heads
  Use use;
  ElementType q_type;
  float scale;  // any sign; 0 too
};

// out [B, N_q, H_q, D] contiguous in the type of v, lse float [B, H_q, N_q] contiguous, natural log. A query that sees
// nothing, or whose frame the stream does not have, gets zeros and -inf.
// The first `whole` tiles of queries have a block each; the keys of every further one are shared by `shares` blocks,
// which write parts [tiles, shares, rows of a tile, D] and part_lse [tiles, shares, rows] for the merge kernel. Tiles
// are numbered by sample, head and row_blocks, the tiles of a head: ceil(queries / rows of a tile).
struct ForwardParams {
  AttentionProblem problem;
  void* out;
  float* lse;
  float* parts;
  float* part_lse;
  int32_t whole, shares;
  int32_t row_blocks;
};

// What a block of a forward kernel needs: kRows queries, one tile of `keys` keys and one of values (for Hopper two of
// each). A warp owns 16 * row_blocks() rows; for Hopper four warps more own none.
struct ForwardTiles {
  static constexpr int kRows = 128;
  int head_dim, keys;
  bool hopper = false;

  constexpr bool wide_warps() const { return !hopper && head_dim <= 128; }  // 32 rows of 256 columns take all registers
  constexpr int row_blocks() const { return wide_warps() ? 2 : 1; }
  constexpr int owners() const { return 32 * kRows / (16 * row_blocks()); }
  constexpr int threads() const { return owners() + (hopper ? 128 : 0); }
  constexpr int blocks_per_sm() const { return wide_warps() ? 2 : 1; }
  constexpr int stages() const { return hopper ? 2 : 1; }
  constexpr int shared_bytes() const {
    return 2 * head_dim * (kRows + 2 * stages() * keys) + (hopper ? kHopperBarrierBytes : kForwardKeptBytes);
  }
};

constexpr int kMergeRows = 8;  // of a block of the merge kernel, a warp each

// Joins the parts of tiles `whole` and the next ones into their rows of out and lse; shares: at most 32.
struct MergeParams {
  const float* parts;
  const float* part_lse;
  void* out;
  float* lse;
  int32_t whole, shares, row_blocks, queries, heads, head_dim;
};

}  // namespace rfkernels::cuda
