// The visibility rule of full-sequence attention as ranges (the rule itself: WindowMask in geometry.h).
//
// Query i sees two ranges of keys, those of its window and the sinks outside it; key j is seen by two ranges of
// queries. All bounds grow with the index, so a tile's union and its fully visible part follow from its first and last
// row.
#pragma once
#include "../../geometry.h"

namespace rfkernels::cuda {

struct Range {
  int begin, end;
};

RF_HOST_DEVICE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
RF_HOST_DEVICE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// The keys that query i sees: its window's, or the sinks outside it.
RF_HOST_DEVICE Range visible_keys(const WindowMask& mask, int i, bool outside, int keys) {
  const int64_t end = mask.chunk_end(i);
  const int64_t limit = least(mask.own_chunk ? end : mask.chunk_begin(i), keys);
  const int64_t old = most(end - mask.window_tokens, 0);
  if (outside) return {0, int(least(limit, least(old, mask.sink_tokens)))};
  return {int(least(old, keys)), int(limit)};
}

// The queries (indices among the keys) that see key j: in their window, or as a sink outside it.
RF_HOST_DEVICE Range seeing_queries(const WindowMask& mask, int j, bool outside, int keys) {
  const int64_t first = mask.own_chunk ? mask.chunk_begin(j) : mask.chunk_end(j);
  const int64_t leaves = mask.chunk_begin(j + mask.window_tokens);  // from this query on, j is outside the window
  if (outside) return {int(least(most(first, leaves), keys)), j < mask.sink_tokens ? keys : 0};
  return {int(least(first, keys)), int(least(leaves, keys))};
}

// Frames evicted when the chunk of query i is open in a stream: sinks stand that much later.
RF_HOST_DEVICE int evicted_frames(const WindowMask& mask, int i, int64_t frame_tokens) {
  const int64_t evicted = mask.chunk_end(i) - mask.sink_tokens - mask.window_tokens;
  return evicted > 0 ? int(quotient(evicted, frame_tokens)) : 0;
}

}  // namespace rfkernels::cuda
