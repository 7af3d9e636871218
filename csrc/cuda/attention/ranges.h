// Which keys a tile of queries sweeps, and which queries a tile of keys: every attention kernel asks here.
//
// The rule of full-sequence attention is WindowMask (geometry.h). As ranges: query i sees two, the keys of its window
// and the sinks outside it, and key j is seen by two ranges of queries. All bounds grow with the index, so what a tile
// sweeps and what all of it sees follow from its first and last row.
#pragma once
#include "params.h"

namespace rfkernels::cuda {

struct Range {
  int begin, end;
};

template <class A, class B>
RF_HOST_DEVICE auto least(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
RF_HOST_DEVICE auto most(A a, B b) {
  return a > b ? a : b;
}

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

// What is known of the rows of a sample's queries.
struct StreamRows {
  int offset = 0;       // kWindow: row + offset is a query's index among the keys
  int first_frame = 0;  // of row 0, negative in a stream that is younger than the chunk; kWindow: of the first key
  int missing = 0;      // rows before this one belong to frames that the stream does not have
  int past = 0;         // tokens of k that are seen (kPrefix, kChunk)

  StreamRows() = default;
  // first_frame and missing alone, for a block of the chunk's own keys.
  RF_HOST_DEVICE void find_open(const AttentionProblem& p, int num_frames) {
    first_frame = num_frames - p.queries / int(p.frame_tokens);
    missing = most(-first_frame, 0) * int(p.frame_tokens);
  }
  RF_HOST_DEVICE StreamRows(const AttentionProblem& p, int sample) {
    if (p.use == Use::kWindow) {
      offset = p.keys - p.queries;
    } else {
      const int num_frames = int(p.num_frames[sample]);
      find_open(p, num_frames);
      const int valid = least(num_frames, int(p.capacity)) - (p.use == Use::kChunk ? num_frames - first_frame : 0);
      past = most(valid, 0) * int(p.frame_tokens);
    }
  }
};

// What a tile sweeps in one go: keys if it owns queries, query rows if it owns keys. Between full_begin and full_end
// every row of the tile sees every key, so nothing has to be hidden there.
struct Sweep {
  int begin, end;
  int full_begin, full_end;

  RF_HOST_DEVICE bool hides(int first, int count) const { return first < full_begin || first > full_end - count; }
};

// part 0: the prefix, the past, or the window; part 1: the open chunk's own keys, or sinks outside the window.
RF_HOST_DEVICE Sweep swept_keys(const AttentionProblem& p, const StreamRows& stream, int part, int first_row,
                                int last_row) {
  const bool own = p.use == Use::kChunk && part == 1;
  Sweep sweep;
  if (p.use == Use::kWindow) {
    const Range first = visible_keys(p.mask, first_row + stream.offset, part == 1, p.keys);
    const Range last = visible_keys(p.mask, last_row + stream.offset, part == 1, p.keys);
    sweep.begin = first.begin, sweep.end = last.end;
    sweep.full_begin = last.begin, sweep.full_end = first.end;
  } else {
    sweep.begin = own ? stream.missing : 0;
    sweep.end = own ? p.queries : stream.past;
    if (last_row < stream.missing) sweep.end = sweep.begin;  // nobody here to attend
    sweep.full_begin = sweep.begin, sweep.full_end = sweep.end;
  }
  return sweep;
}

// Of those the keys that one row sees; a row past the end sees what the last does.
RF_HOST_DEVICE Range keys_of_row(const AttentionProblem& p, int part, int row, int begin, int end) {
  if (p.use != Use::kWindow) return {begin, end};
  return visible_keys(p.mask, least(row, p.queries - 1) + p.keys - p.queries, part == 1, p.keys);
}

// Rows of queries that see some of a tile of keys, in their window or as sinks outside it. kChunk: of the chunk's own.
RF_HOST_DEVICE Sweep swept_queries(const AttentionProblem& p, const StreamRows& stream, bool outside, int first_key,
                                   int last_key) {
  if (p.use == Use::kChunk) {
    const int begin = stream.missing, end = last_key < begin ? begin : p.queries;
    return {begin, end, begin, end};
  }
  const Range first = seeing_queries(p.mask, first_key, outside, p.keys);
  const Range last = seeing_queries(p.mask, last_key, outside, p.keys);
  const int offset = p.keys - p.queries;
  // Of a tile only the first keys may be sinks: then its last key sees nobody, and every row needs the mask.
  const bool only_first = outside && first_key < p.mask.sink_tokens && last_key >= p.mask.sink_tokens;
  return {most(first.begin - offset, 0), (only_first ? p.keys : last.end) - offset, most(last.begin - offset, 0),
          only_first ? 0 : first.end - offset};
}

}  // namespace rfkernels::cuda
