"""The visibility rule of full-sequence attention on the device: `rfkernels.geometry.WindowMask`, as ranges.

Query i sees two ranges of keys, those of its window and the sinks outside it; key j is seen by two ranges of queries.
All bounds grow with the index, so a tile's union and its fully visible part follow from its first and last row.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def chunk_floor(i, chunk, first):
    """The first token of i's chunk, which is also the last chunk end that is not after i."""
    return tl.where(i < first, 0, first + tl.maximum(i - first, 0) // chunk * chunk)


@triton.jit
def chunk_end(i, chunk, first):
    return tl.where(i < first, first, first + (tl.maximum(i - first, 0) // chunk + 1) * chunk)


@triton.jit
def evicted_frames(i, frame_tokens, sink, window, chunk, first):
    """Frames evicted when the chunk of query i is open."""
    return tl.maximum(chunk_end(i, chunk, first) - sink - window, 0) // frame_tokens


@triton.jit
def visible_keys(i, outside, keys, sink, window, chunk, first, OWN_CHUNK: tl.constexpr):
    """The range of keys [low, high) that query i sees: its window's, or the sinks ``outside`` it."""
    end = chunk_end(i, chunk, first)
    limit = end
    if not OWN_CHUNK:
        limit = chunk_floor(i, chunk, first)
    limit = tl.minimum(limit, keys)
    old = tl.maximum(end - window, 0)
    low = tl.where(outside, 0, old)
    high = tl.where(outside, tl.minimum(limit, tl.minimum(old, sink)), limit)
    return low, high


@triton.jit
def seeing_queries(j, outside, keys, sink, window, chunk, first, OWN_CHUNK: tl.constexpr):
    """The range of queries [low, high) that see key j: in their window, or as a sink ``outside`` it."""
    if OWN_CHUNK:
        low = chunk_floor(j, chunk, first)
    else:
        low = chunk_end(j, chunk, first)
    leaves = chunk_floor(j + window, chunk, first)  # from this query on, j is outside the window
    high = tl.where(outside, tl.where(j < sink, keys, 0), tl.minimum(leaves, keys))
    low = tl.where(outside, tl.maximum(low, leaves), low)
    return low, high


@triton.jit
def share(begin, end, split, BLOCK: tl.constexpr, SPLITS: tl.constexpr):
    """The part of [begin, end) that one of SPLITS programs sweeps, whole tiles but for the last."""
    if SPLITS > 1:
        size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK), SPLITS) * BLOCK
        begin = begin + split * size
        end = tl.minimum(end, begin + size)
    return begin, end


@triton.jit
def interior(begin, end, full_begin, full_end, BLOCK: tl.constexpr):
    """Where the mask-free tiles of a sweep from begin to end start and stop."""
    lead = tl.cdiv(tl.maximum(full_begin - begin, 0), BLOCK) * BLOCK
    start = tl.minimum(begin + lead, tl.maximum(end, begin))
    stop = start + tl.maximum(tl.minimum(full_end, end) - start, 0) // BLOCK * BLOCK
    return start, stop
