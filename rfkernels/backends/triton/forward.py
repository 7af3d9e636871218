"""Kernels of the forward pass: one for a cache's prefix, for an open chunk and for full sequences; one that merges."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ranges import keys_of_queries, open_chunk, sees
from .rotation import query_phases, rotate_tile
from .tiling import LN_2, LOG2_E, columns_of, dot, key_values_of, load_tile, narrow, tile_of


class Softmax(NamedTuple):
    """An online softmax in base 2, unfinished.

    values: the weighted sum ``[rows, columns]``. total ``[rows, 8]``: weights added up by the number of their key
    modulo 8, which one thread holds: the sum across threads is left for the end. top ``[rows]``: the largest score.
    """

    values: Any
    total: Any
    top: Any


@triton.jit
def _sweep(
    softmax, q, held, columns, begin, end, bounds, scale,
    MASKED: tl.constexpr, ROW_BOUNDS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys [begin, end) of one segment, in tiles.

    MASKED: nothing is seen or loaded from ``bounds.end`` on, and with ROW_BOUNDS a row sees [low, high) only.
    Otherwise every row sees every key and the loop holds no mask (but for the padding of a head).
    """
    acc, total, top = softmax
    within = tl.arange(0, BLOCK_N)
    # A moving scalar base and fixed 32-bit offsets: pointers to every row would take twice the registers. Unsigned:
    # sign extension would cost instructions in the loop.
    k_offsets = (within[:, None] * held.k.step + columns.k.at[None, :]).to(tl.uint32)
    v_offsets = (within[:, None] * held.v.step + columns.v.at[None, :]).to(tl.uint32)
    k_base = held.k.first + tl.cast(begin, tl.int64) * held.k.step
    v_base = held.v.first + tl.cast(begin, tl.int64) * held.v.step
    for key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        if MASKED:
            loads = (key + within < bounds.end)[:, None]
            keys = tl.load(k_base + k_offsets, mask=loads & columns.k.exist[None, :], other=0.0)
        elif PADDED:
            keys = tl.load(k_base + k_offsets, mask=columns.k.exist[None, :], other=0.0)
        else:
            keys = tl.load(k_base + k_offsets)
        scores = dot(q, tl.trans(keys))
        if MASKED:
            seen = sees(bounds, (key + within)[None, :], ROW_BOUNDS)
            scores = tl.where(seen, scores * scale, float("-inf"))
            new = tl.maximum(top, tl.max(scores, 1))
            finite = tl.where(new == float("-inf"), 0.0, new)  # rows that have seen nothing yet
            weights = tl.math.exp2(scores - finite[:, None])
            shrink = tl.math.exp2(top - finite)
        else:
            new = tl.maximum(top, tl.max(scores, 1) * scale)
            weights = tl.math.exp2(scores * scale - new[:, None])
            shrink = tl.math.exp2(top - new)
        total = total * shrink[:, None] + tl.sum(tl.reshape(weights, (acc.shape[0], BLOCK_N // 8, 8)), 1)
        acc = acc * shrink[:, None]
        if MASKED:
            values = tl.load(v_base + v_offsets, mask=loads & columns.v.exist[None, :], other=0.0)
        elif PADDED:
            values = tl.load(v_base + v_offsets, mask=columns.v.exist[None, :], other=0.0)
        else:
            values = tl.load(v_base + v_offsets)
        acc = dot(weights.to(values.dtype), values, acc)
        top = new
        k_base += BLOCK_N * held.k.step
        v_base += BLOCK_N * held.v.step
    return Softmax(acc, total, top)


@triton.jit
def _sweep_segment(
    softmax, q, held, columns, bounds, scale,
    ROW_BOUNDS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All keys of a segment: those that every row sees without a mask, and the edges."""
    # Masks need registers: edges go in smaller tiles, which also waste fewer keys.
    EDGE_N: tl.constexpr = max(min(BLOCK_N // 2, 32), 16)  # float32 products of 8 keys need Triton 3.8
    if ROW_BOUNDS:
        softmax = _sweep(
            softmax, q, held, columns, bounds.begin, tl.minimum(bounds.start, bounds.end), bounds, scale, True, True,
            PADDED, EDGE_N, STAGES,
        )  # fmt: skip
    softmax = _sweep(
        softmax, q, held, columns, bounds.start, bounds.stop, bounds, scale, False, False, PADDED, BLOCK_N, STAGES
    )
    return _sweep(
        softmax, q, held, columns, bounds.stop, bounds.end, bounds, scale, True, ROW_BOUNDS, PADDED, EDGE_N, STAGES
    )


@triton.jit
def _load_queries(
    q, tile, columns, chunk, frames, rope, mask, queries, keys, DTYPE: tl.constexpr, HIDE_JOIN: tl.constexpr,
    TWO_FRAMES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of queries in the dtype of the keys; with a rope rotated at its frames. HIDE_JOIN: `tiles.hides_joins`."""
    values = load_tile(q, tile, columns)
    if rope is not None:
        offset = keys - queries if mask is not None else 0
        cos, sin = query_phases(
            tile, offset, queries, chunk.first_frame, 0, frames.tokens, mask, rope, TWO_FRAMES, D, BLOCK_D
        )
        rotated = values.to(tl.float32)
        if HIDE_JOIN:
            if queries > 0:  # always so
                rotated = rotate_tile(values, cos, sin, rope)
        else:
            rotated = rotate_tile(values, cos, sin, rope)
        values = rotated
    return narrow(values, DTYPE)


@triton.jit
def _store_results(
    softmax, tile, columns, place, missing, queries, heads, OUT, LSE, PART: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Finishes a softmax; stores it in ``OUT [*, queries, heads, D], LSE [*, heads, queries]``, ``place``: the sample.

    PART: in ``OUT [*, rows, D], LSE [*, rows]``, every row of the tile as number ``place``.
    """
    acc, total, top = softmax
    within = tl.arange(0, acc.shape[0])
    total = tl.sum(total, 1)
    empty = (total == 0.0) | (tile.first + within < missing)
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN_2)
    if PART:
        stored = within < acc.shape[0]
        at_lse = place * acc.shape[0]
        at_out, step = at_lse * D, D
    else:
        stored = within < queries - tile.first
        at_lse = (place * heads + tile.head) * queries + tile.first
        at_out, step = ((place * queries + tile.first) * heads + tile.head) * D, heads * D
    # First: after the other store, one more register would be held through all sweeps.
    tl.store(LSE + at_lse + within, lse, mask=stored)
    tl.store(
        OUT + at_out + (within[:, None] * step + columns.at[None, :]), narrow(out, OUT.dtype.element_ty),
        mask=stored[:, None] & columns.exist[None, :],
    )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def forward_kernel(
    q, sink_q, cached, own, OUT, LSE, frames, rope, mask, scale, queries, keys, heads, first,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr, TWO_FRAMES: tl.constexpr, HIDE_JOIN: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of one head and sweeps all keys they see.

    SHARES > 1: one of as many shares of those keys, of the tiles from ``first`` on. OUT and LSE then hold parts,
    ``[tiles, SHARES, BLOCK_M, D]`` and ``[tiles, SHARES, BLOCK_M]``.
    With a mask ``cached`` holds the keys of full sequences; else the first ``min(frames.seen, frames.capacity)`` frames
    of a cache, or, where a chunk's ``own`` keys lie apart, what comes before the chunk. Queries are rotated here, at
    their frame; those for sinks outside the window come rotated, as ``sink_q``.
    """
    share = tl.program_id(1)
    blocks = tl.cdiv(queries, BLOCK_M)
    index = tl.program_id(0)
    if SHARES > 1:
        index += first
    head = index // blocks % heads
    sample = index // (blocks * heads)
    tile = tile_of(index % blocks, sample, head, queries, BLOCK_M)
    chunk = open_chunk(frames, sample, queries, own is not None)
    columns = columns_of(rope, D, BLOCK_D)
    softmax = Softmax(
        tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
        tl.zeros([BLOCK_M, 8], tl.float32),
        tl.full([BLOCK_M], float("-inf"), tl.float32),
    )
    held = key_values_of(cached, sample, head // GROUP)
    DTYPE: tl.constexpr = cached.k.data.dtype.element_ty
    tile_q = _load_queries(
        q, tile, columns.k, chunk, frames, rope, mask, queries, keys, DTYPE, HIDE_JOIN, TWO_FRAMES, D, BLOCK_D
    )
    # Unrolled: sweeps inside another loop would take the accumulator's layout from it, and convert it in every
    # iteration (sm_100).
    for segment in tl.static_range(1 if mask is None and own is None else 2):
        if own is not None:
            if segment == 1:
                held = key_values_of(own, sample, head // GROUP)
        bounds = keys_of_queries(
            tile, segment, chunk, frames.tokens, mask, queries, keys, share, BLOCK_M, BLOCK_N, SHARES
        )
        softmax = _sweep_segment(
            softmax, tile_q, held, columns, bounds, scale * LOG2_E, mask is not None, D != BLOCK_D, BLOCK_N, STAGES
        )
        if sink_q is not None and segment == 0:
            tl.debug_barrier()  # or the load moves before the sweeps, where its registers are missing
            tile_q = load_tile(sink_q, tile, columns.k)
    # The sample, for share is 0. Written so, ptxas computes it here and does not hold it through the sweeps (which cost
    # 43 spills on sm_90).
    place = share * (tl.num_programs(0) // (blocks * heads)) + sample
    if SHARES > 1:
        place = tl.program_id(0) * SHARES + share
    _store_results(
        softmax, tile, columns.v, place.to(tl.int64), chunk.missing, queries, heads, OUT, LSE, SHARES > 1, D
    )  # fmt: skip


@triton.jit(do_not_specialize=["first"])
def merge_kernel(
    PARTS, PART_LSE, OUT, LSE, queries, heads, first,
    SHARES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE_M: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Joins the parts ``[tiles, SHARES, TILE_M, D]`` of disjoint keys by their normalisers ``[tiles, SHARES, TILE_M]``.

    Tile 0 of the parts is tile ``first`` of the queries; a program owns BLOCK_M rows of one.
    """
    part = tl.program_id(0) // (TILE_M // BLOCK_M)
    within = tl.program_id(0) % (TILE_M // BLOCK_M) * BLOCK_M + tl.arange(0, BLOCK_M)
    blocks = tl.cdiv(queries, TILE_M)
    index = first + part
    row = index % blocks * TILE_M + within
    head = index // blocks % heads
    sample = (index // (blocks * heads)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    stored = row < queries
    exist = stored[:, None] & (columns < D)[None, :]
    place = part.to(tl.int64) * (SHARES * TILE_M)
    at_lse = PART_LSE + place + within
    at_out = PARTS + place * D + (within[:, None] * D + columns[None, :])
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for share in tl.static_range(SHARES):
        top = tl.maximum(top, tl.load(at_lse + share * TILE_M, mask=stored, other=0.0))
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for share in tl.static_range(SHARES):
        weight = tl.math.exp2((tl.load(at_lse + share * TILE_M, mask=stored, other=0.0) - top) * LOG2_E)
        total += weight
        acc += weight[:, None] * tl.load(at_out + share * (TILE_M * D), mask=exist, other=0.0)
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top + tl.math.log2(total) * LN_2)
    out = ((sample * queries + row) * heads + head) * D
    tl.store(OUT + out[:, None] + columns[None, :], narrow(acc / total[:, None], OUT.dtype.element_ty), mask=exist)
    tl.store(LSE + (sample * heads + head) * queries + row, lse, mask=stored)
