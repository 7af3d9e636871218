// What the host hands to the kernels of the attention backward, and how it launches them. No torch header.
//
// A backward is four steps, in this order:
// 1. rotate the queries in a launch of their own (`rf_rotate`), rounded to the type of v: they are read once per tile
// of
//    keys. kWindow with a rope: twice, for sinks outside the window at their frame less the evicted ones.
// 2. rf_attention_delta_{bf16,fp16}: DeltaParams, delta_launch.
// 3. rf_attention_grad_q_{bf16,fp16}_d<head_dim>: BackwardParams, grad_q_launch.
// 4. rf_attention_grad_kv_{bf16,fp16}_d<head_dim>: BackwardParams, grad_kv_launch. 3 and 4 do not depend on each other.
// Every output element is written by one block, in one order: equal inputs give equal bits.
#pragma once
#include "params.h"

namespace rfkernels::cuda {

// row_terms of a query row: (log2(e) * lse, sum(out * grad_out) - grad_lse). A row that sees nothing: (inf, 0).
struct DeltaParams {
  Rows out, grad_out;                      // [B, N_q, H_q, D] in the type of v
  const float* lse;                        // [B, H_q, N_q] contiguous
  const float* grad_lse;                   // strided, in elements; 0 where a gradient is expanded
  int64_t lse_batch, lse_head, lse_token;  // strides of grad_lse
  float* row_terms;                        // [B, H_q, N_q, 2] contiguous
  int32_t batch, queries, heads, head_dim;
};

struct BackwardParams {
  AttentionProblem problem;  // kChunk or kWindow. q: rotated, in the type of v (q_type is not read); rope: still given
  Rows sink_q;               // kWindow: queries as sinks outside the window meet them; without a rope q again
  Rows grad_out;             // in the type of v
  const float* row_terms;    // of the delta kernel
  void *grad_q, *grad_k, *grad_v;  // contiguous [B, N, H, D], un-rotated; kChunk: of own_k and own_v
  ElementType grad_q_type, grad_k_type, grad_v_type;
};

// A block keeps `own` rows (queries for grad_q, keys for grad_kv) of two tensors and sweeps the others in
// double-buffered tiles of `swept` rows. A warp owns 16 * row_blocks rows of one of column_parts parts of the head's
// columns.
struct BackwardTiles {
  int row_blocks, warps, column_parts, swept;

  constexpr int own() const { return 16 * row_blocks * warps / column_parts; }
  constexpr int shared_bytes(int head_dim) const { return 4 * head_dim * own() + 2 * (4 * head_dim + 8) * swept; }
};

// Registers of a thread at head_dim 128: accumulators 64 (grad_q) or 128 (grad_kv), scores and their gradients 16 each.
// Two row blocks would halve the reads of swept tiles at head_dim 64, and spill on sm_90.
constexpr BackwardTiles grad_q_tiles(int head_dim) {
  return head_dim <= 128 ? BackwardTiles{1, 8, 1, 32} : BackwardTiles{1, 8, 2, 16};  // 256 columns a warp would spill
}

constexpr BackwardTiles grad_kv_tiles(int head_dim) {
  return head_dim <= 128 ? BackwardTiles{1, 8, 1, 32}
                         : BackwardTiles{1, 8, 2, 16};  // two accumulators of 256 columns: half to each warp
}

struct Launch {
  int64_t blocks;
  int threads, shared_bytes;
};

constexpr int kDeltaThreads = 256, kDeltaLanes = 8;  // lanes that share a row

inline Launch delta_launch(const DeltaParams& p) {
  const int64_t rows = int64_t(p.batch) * p.queries * p.heads, per_block = kDeltaThreads / kDeltaLanes;
  return {(rows + per_block - 1) / per_block, kDeltaThreads, 0};
}

inline Launch backward_launch(const BackwardTiles& tiles, int64_t rows, int64_t heads, int64_t batch, int head_dim) {
  return {(rows + tiles.own() - 1) / tiles.own() * heads * batch, 32 * tiles.warps, tiles.shared_bytes(head_dim)};
}

inline Launch grad_q_launch(const AttentionProblem& p, int head_dim) {
  return backward_launch(grad_q_tiles(head_dim), p.queries, p.heads, p.batch, head_dim);
}

inline Launch grad_kv_launch(const AttentionProblem& p, int head_dim) {
  const int keys = p.use == Use::kChunk ? p.queries : p.keys;
  return backward_launch(grad_kv_tiles(head_dim), keys, p.kv_heads, p.batch, head_dim);
}

}  // namespace rfkernels::cuda
