// How many blocks share the keys of one tile of queries. The Python twin is rfkernels/backends/plan.py, which says why;
// tests/test_plan.py holds the two together. No torch header.
#pragma once
#include <algorithm>
#include <cstdint>

namespace rfkernels {

constexpr int64_t kMostShares = 16, kLaunchKeys = 256, kPartKeys = 192;

// The time of all tiles with `shares` blocks for the keys of each, in units of half a key on all processors.
inline int64_t sharing_cost(int64_t shares, int64_t row_tiles, int64_t keys, int64_t tile_keys, int64_t processors,
                            int64_t per_processor) {
  const auto divide_up = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  const int64_t blocks = row_tiles * shares, wave = processors * per_processor, rest = blocks % wave;
  const int64_t share = divide_up(divide_up(keys, tile_keys), shares) * tile_keys;
  const int64_t last = rest == 0 ? 0 : divide_up(rest, processors) + per_processor;
  const int64_t sweep = (2 * (blocks / wave) * per_processor + last) * share;
  if (shares == 1) return processors * sweep;
  return processors * (sweep + 2 * kLaunchKeys) + 2 * kPartKeys * blocks;
}

inline int64_t key_shares(int64_t row_tiles, int64_t keys, int64_t tile_keys, int64_t processors,
                          int64_t per_processor) {
  if (row_tiles >= 2 * processors) return 1;
  int64_t best = 1;
  const auto cost = [&](int64_t n) { return sharing_cost(n, row_tiles, keys, tile_keys, processors, per_processor); };
  for (int64_t n = 2; n <= std::min(keys / (2 * tile_keys), kMostShares); ++n)
    if (cost(n) < cost(best)) best = n;
  return best;
}

}  // namespace rfkernels
