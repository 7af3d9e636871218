// Which blocks sweep the keys of which tile of queries. The Python twin is rfkernels/backends/plan.py, which says why;
// tests/test_plan.py holds the two together. No torch header.
#pragma once
#include <algorithm>
#include <cstdint>

#include "geometry.h"

namespace rfkernels {

constexpr int64_t kMostShares = 16, kLaunchKeys = 256, kPartKeys = 192;

// The first `whole` tiles of queries have a block each, every further one (the tail) has `shares`.
struct TilePlan {
  int64_t whole, shares;

  int64_t blocks(int64_t row_tiles) const { return whole + (row_tiles - whole) * shares; }
};

// The time of `blocks` that sweep `share` keys each, in half of what a processor takes for a key alone.
inline int64_t sweep_time(int64_t blocks, int64_t share, int64_t processors, int64_t per_processor) {
  const int64_t wave = processors * per_processor, rest = blocks % wave;
  const int64_t last = rest == 0 ? 0 : divide_up(rest, processors) + per_processor;
  return (2 * (blocks / wave) * per_processor + last) * share;
}

// The time of all tiles by a plan, the merge included, in units of half a key on all processors.
inline int64_t plan_time(const TilePlan& plan, int64_t row_tiles, int64_t keys, int64_t tile_keys, int64_t processors,
                         int64_t per_processor) {
  const int64_t key_tiles = divide_up(keys, tile_keys), parts = (row_tiles - plan.whole) * plan.shares;
  const int64_t time = sweep_time(plan.whole, key_tiles * tile_keys, processors, per_processor) +
                       sweep_time(parts, divide_up(key_tiles, plan.shares) * tile_keys, processors, per_processor);
  return plan.shares == 1 ? processors * time : processors * (time + 2 * kLaunchKeys) + 2 * kPartKeys * parts;
}

// The cheapest plan; where sharing does not pay, all tiles are whole and shares is 1.
inline TilePlan plan_tiles(int64_t row_tiles, int64_t keys, int64_t tile_keys, int64_t processors,
                           int64_t per_processor) {
  const auto time = [&](const TilePlan& plan) {
    return plan_time(plan, row_tiles, keys, tile_keys, processors, per_processor);
  };
  const int64_t wave = processors * per_processor, full = row_tiles / wave * wave;
  TilePlan best{row_tiles, 1};
  for (int64_t shares = 2; full < row_tiles && shares <= std::min(keys / (2 * tile_keys), kMostShares); ++shares)
    if (time({full, shares}) < time(best)) best = {full, shares};
  return best;
}

}  // namespace rfkernels
