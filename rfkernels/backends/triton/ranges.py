"""Which keys a tile of queries sweeps, and which queries a tile of keys.

The rule is that of docs/semantics.md, "Full-sequence attention"; `geometry.WindowMask` is its twin on the host.
Keys lie in two segments. Full-sequence attention: 0, the window of a query; 1, the sinks outside it. An open chunk:
0, what was before it; 1, its own keys. Streaming attention has one: the valid prefix of the cache. All bounds grow with
the index, so that what a tile's rows see together, and what each of them sees, follow from its first and last row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .structs import Bounds, Chunk


@triton.jit
def chunk_floor(i, mask):
    """The first token of i's chunk, which is also the last chunk end that is not after i."""
    first = mask.first_chunk_tokens
    return tl.where(i < first, 0, first + tl.maximum(i - first, 0) // mask.chunk_tokens * mask.chunk_tokens)


@triton.jit
def chunk_end(i, mask):
    first = mask.first_chunk_tokens
    return tl.where(i < first, first, first + (tl.maximum(i - first, 0) // mask.chunk_tokens + 1) * mask.chunk_tokens)


@triton.jit
def evicted_frames(i, frame_tokens, mask):
    """Frames evicted when the chunk of query i is open."""
    return tl.maximum(chunk_end(i, mask) - mask.sink_tokens - mask.window_tokens, 0) // frame_tokens


@triton.jit
def visible_keys(i, outside, keys, mask):
    """The keys [low, high) that query i sees: its window's, or the sinks ``outside`` it."""
    end = chunk_end(i, mask)
    limit = end
    if not mask.own_chunk:
        limit = chunk_floor(i, mask)
    limit = tl.minimum(limit, keys)
    old = tl.maximum(end - mask.window_tokens, 0)
    low = tl.where(outside, 0, old)
    high = tl.where(outside, tl.minimum(limit, tl.minimum(old, mask.sink_tokens)), limit)
    return low, high


@triton.jit
def seeing_queries(j, outside, keys, mask):
    """The queries [low, high) that see key j: in their window, or as a sink ``outside`` it."""
    if mask.own_chunk:
        low = chunk_floor(j, mask)
    else:
        low = chunk_end(j, mask)
    leaves = chunk_floor(j + mask.window_tokens, mask)  # from this query on, j is outside the window
    high = tl.where(outside, tl.where(j < mask.sink_tokens, keys, 0), tl.minimum(leaves, keys))
    low = tl.where(outside, tl.maximum(low, leaves), low)
    return low, high


@triton.jit
def open_chunk(frames, sample, queries, SEPARATE: tl.constexpr):
    """The open chunk of a stream; without streams all zeros. SEPARATE: its own keys are not in the cache."""
    if frames.seen is None:
        return Chunk(0, 0, 0)
    else:
        seen = tl.load(frames.seen + sample).to(tl.int32)
        count = queries // frames.tokens
        before = tl.minimum(seen, frames.capacity)
        if SEPARATE:
            before = tl.maximum(before - count, 0)
        return Chunk(seen - count, tl.maximum(count - seen, 0) * frames.tokens, before)


@triton.jit
def _range_of_tile(first, last, each, segment, keys, mask, RULE: tl.constexpr):
    """By `visible_keys` or `seeing_queries`: bounds of all rows together, of what each row has, and row by row."""
    begin, inner_end = RULE(first, segment == 1, keys, mask)
    inner_begin, end = RULE(last, segment == 1, keys, mask)
    low, high = RULE(each, segment == 1, keys, mask)
    return begin, inner_begin, inner_end, end, low, high


@triton.jit
def _without_mask(begin, end, inner_begin, inner_end, BLOCK: tl.constexpr):
    """Where the mask-free tiles of a sweep from begin to end start and stop."""
    lead = tl.cdiv(tl.maximum(inner_begin - begin, 0), BLOCK) * BLOCK
    start = tl.minimum(begin + lead, tl.maximum(end, begin))
    stop = start + tl.maximum(tl.minimum(inner_end, end) - start, 0) // BLOCK * BLOCK
    return start, stop


@triton.jit
def keys_of_queries(
    tile, segment, chunk, frame_tokens, mask, queries, keys, share, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr,
):  # fmt: skip
    """The `Bounds` of a tile of queries through a segment of the keys, or through one of SHARES equal parts of it."""
    low, high = tile.row, tile.row
    if mask is not None:
        offset = keys - queries
        last = tl.minimum(tile.first + BLOCK_M, queries) - 1 + offset
        begin, inner_begin, inner_end, end, low, high = _range_of_tile(
            tile.first + offset, last, tile.first + tile.row + offset, segment, keys, mask, visible_keys
        )
    else:
        begin = chunk.missing * segment
        end = chunk.before * frame_tokens
        if segment == 1:
            end = queries
        end = tl.where(tile.first + BLOCK_M <= chunk.missing, begin, end)  # nobody here to attend
        inner_begin, inner_end = begin, end
    if SHARES > 1:  # whole tiles but for the last
        size = tl.cdiv(tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N), SHARES) * BLOCK_N
        begin = begin + share * size
        end = tl.minimum(end, begin + size)
    start, stop = _without_mask(begin, end, inner_begin, inner_end, BLOCK_N)
    return Bounds(begin, start, stop, end, low, high)


@triton.jit
def queries_of_keys(tile, segment, chunk, mask, queries, keys, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The `Bounds` of a tile of keys through the query rows that meet it in a segment; a chunk's own keys: all rows."""
    if mask is not None:
        last = tl.minimum(tile.first + BLOCK_N, keys) - 1
        begin, inner_begin, inner_end, end, low, high = _range_of_tile(
            tile.first, last, tile.first + tile.row, segment, keys, mask, seeing_queries
        )
        if segment == 1:
            # Only the tile's first keys may be sinks: then its last key sees nobody, and every row needs the mask.
            end = tl.where(tile.first < mask.sink_tokens, keys, end)
            inner_end = tl.where(last >= mask.sink_tokens, 0, inner_end)
        offset = keys - queries  # from indices in the sequence to rows
        begin, inner_begin = tl.maximum(begin - offset, 0), tl.maximum(inner_begin - offset, 0)
        end, inner_end = tl.maximum(end - offset, 0), tl.maximum(inner_end - offset, 0)
        low, high = low - offset, high - offset
    else:
        begin, end = chunk.missing, queries
        inner_begin, inner_end = begin, end
        low = tile.row * 0 + chunk.missing
        high = tile.row * 0 + queries
    start, stop = _without_mask(begin, end, inner_begin, inner_end, BLOCK_M)
    return Bounds(begin, start, stop, end, low, high)


@triton.jit
def sees(bounds, index, ROW_BOUNDS: tl.constexpr):
    """Whether the rows of a tile see the keys ``index [1, keys]``; without ROW_BOUNDS all rows see the same."""
    if ROW_BOUNDS:
        return (index >= bounds.low[:, None]) & (index < bounds.high[:, None])
    else:
        return index < bounds.end
