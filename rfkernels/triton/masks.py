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
def visible_keys(i, keys, sink, window, chunk, first, OWN_CHUNK: tl.constexpr, SINK: tl.constexpr):
    """The range of keys [low, high) that query i sees: its window's, or the sinks outside it."""
    end = chunk_end(i, chunk, first)
    limit = end
    if not OWN_CHUNK:
        limit = chunk_floor(i, chunk, first)
    limit = tl.minimum(limit, keys)
    if SINK:
        low = i * 0
        high = tl.maximum(tl.minimum(limit, tl.minimum(end - window, sink)), 0)
    else:
        low = tl.maximum(end - window, 0)
        high = limit
    return low, high


@triton.jit
def seeing_queries(j, keys, sink, window, chunk, first, OWN_CHUNK: tl.constexpr, SINK: tl.constexpr):
    """The range of queries [low, high) that see key j: in their window, or as a sink outside it."""
    if OWN_CHUNK:
        low = chunk_floor(j, chunk, first)
    else:
        low = chunk_end(j, chunk, first)
    leaves = chunk_floor(j + window, chunk, first)  # from this query on, j is outside the window
    if SINK:
        low = tl.maximum(low, leaves)
        high = tl.where(j < sink, keys, 0)
    else:
        high = tl.minimum(leaves, keys)
    return low, high
