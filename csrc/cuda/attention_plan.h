// Which kernel, tile and grid serve a forward problem: one pure function of sizes and the device, so that a test can
// ask for every device. Nothing is tuned at run time.
#pragma once
#include <cstdint>

#include "attention_params.h"

namespace rfkernels::cuda {

struct ForwardPlan {
  ElementType type;        // kernel rf_attention_forward_{fp16,bf16}_d{head_dim}, with suffix _k32 if small
  int32_t head_dim;
  bool small;              // half the keys of a tile
  int32_t tile_rows, tile_keys, threads, shared_bytes;
  int32_t row_blocks;      // ForwardParams::row_blocks
  int32_t splits;          // ForwardParams::splits; more than one: the merge kernel follows
  int64_t blocks;          // gridDim.x; gridDim.y = splits
};

inline bool forward_serves(ElementType type, int head_dim) {
  return type != ElementType::kFloat32 &&
         (head_dim == 64 || head_dim == 80 || head_dim == 96 || head_dim == 128 || head_dim == 256);
}

// longest: keys that a query may see, at most. shared_per_sm in bytes (100 KB: sm_86, sm_89, sm_120).
inline ForwardPlan plan_forward(ElementType type, int head_dim, int batch, int heads, int queries, int64_t longest,
                                int processors, int shared_per_sm) {
  ForwardPlan plan{};
  plan.type = type, plan.head_dim = head_dim;
  plan.small = head_dim == 128 && shared_per_sm < 2 * (64 * 1024 + 1024);  // two blocks of 64 keys do not fit
  plan.tile_rows = 128;
  plan.tile_keys = plan.small || head_dim == 256 ? 32 : 64;
  plan.threads = head_dim == 256 ? 256 : 128;
  plan.shared_bytes = 2 * head_dim * (plan.tile_rows + 2 * plan.tile_keys) + 32;
  plan.row_blocks = (queries + plan.tile_rows - 1) / plan.tile_rows;
  plan.blocks = int64_t(plan.row_blocks) * heads * batch;
  // As many shares of the keys as fill one wave, each with two tiles or more.
  const int64_t slots = int64_t(processors) * (head_dim == 256 ? 1 : 2);
  int64_t splits = plan.blocks > 0 ? slots / plan.blocks : 1;
  if (splits > longest / (2 * plan.tile_keys)) splits = longest / (2 * plan.tile_keys);
  plan.splits = int32_t(splits < 1 ? 1 : splits > 16 ? 16 : splits);
  return plan;
}

}  // namespace rfkernels::cuda
