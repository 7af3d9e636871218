"""dQ by tiles of queries. Queries and keys come rotated; the gradient is rotated back before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .ranges import keys_of_queries, open_chunk, sees
from .rotation import query_phases, rotate_tile
from .structs import Terms
from .tiling import LOG2_E, columns_of, dot, key_values_of, load_tile, narrow, tile_of


@triton.jit
def _sweep_keys(
    acc, q, terms, held, columns, begin, end, bounds, scale,
    MASKED: tl.constexpr, ROW_BOUNDS: tl.constexpr, GRAD_LSE: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ (but for the scale) of keys [begin, end); masks as in the forward sweep."""
    within = tl.arange(0, BLOCK_N)
    k_offsets = within[:, None] * held.k.step + columns.k.at[None, :]
    v_offsets = within[:, None] * held.v.step + columns.v.at[None, :]
    k_base = held.k.first + tl.cast(begin, tl.int64) * held.k.step
    v_base = held.v.first + tl.cast(begin, tl.int64) * held.v.step
    for key in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        k_loads, v_loads = columns.k.exist[None, :], columns.v.exist[None, :]
        if MASKED:
            loads = (key + within < bounds.end)[:, None]
            k_loads, v_loads = loads & k_loads, loads & v_loads
        keys = tl.load(k_base + k_offsets, mask=k_loads, other=0.0)
        values = tl.load(v_base + v_offsets, mask=v_loads, other=0.0)
        scores = dot(q, tl.trans(keys))
        weights = tl.math.exp2(scores * scale - terms.lse2[:, None])
        if MASKED:
            seen = sees(bounds, (key + within)[None, :], ROW_BOUNDS)
            weights = tl.where(seen, weights, 0.0)
        grad_weights = dot(terms.grad_out, tl.trans(values)) - terms.delta[:, None]
        if GRAD_LSE:  # `backward.delta_kernel` left it out
            grad_weights += terms.grad_lse[:, None]
        acc = dot((weights * grad_weights).to(keys.dtype), keys, acc)
        k_base += BLOCK_N * held.k.step
        v_base += BLOCK_N * held.v.step
    return acc


@triton.jit
def _sweep_segment(
    acc, q, terms, held, columns, bounds, scale,
    ROW_BOUNDS: tl.constexpr, GRAD_LSE: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if ROW_BOUNDS:
        acc = _sweep_keys(
            acc, q, terms, held, columns, bounds.begin, tl.minimum(bounds.start, bounds.end), bounds, scale, True, True,
            GRAD_LSE, BLOCK_N, STAGES,
        )  # fmt: skip
    acc = _sweep_keys(
        acc, q, terms, held, columns, bounds.start, bounds.stop, bounds, scale, False, False, GRAD_LSE, BLOCK_N, STAGES
    )
    return _sweep_keys(
        acc,
        q,
        terms,
        held,
        columns,
        bounds.stop,
        bounds.end,
        bounds,
        scale,
        True,
        ROW_BOUNDS,
        GRAD_LSE,
        BLOCK_N,
        STAGES,
    )


@triton.jit
def _load_terms(incoming, tile, columns, queries, heads, DTYPE: tl.constexpr):
    """What the sweeps need of a tile's queries besides themselves."""
    grad_out = load_tile(incoming.grad_out, tile, columns).to(DTYPE)
    at = (tile.sample * heads + tile.head) * queries + tile.first + tile.row
    lse = tl.load(incoming.lse + at)
    # Rows that see nothing have -inf: +inf instead makes their weights zero.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(incoming.delta + at)
    grad_lse = delta  # not read: a function cannot return None below Triton 3.8
    if incoming.grad_lse is not None:
        grad_lse = tl.load(incoming.grad_lse + at)
    return Terms(grad_out, lse2, delta, grad_lse)


@triton.jit
def grad_q_kernel(
    q, sink_q, cached, own, incoming, GRAD_Q, frames, rope, mask, scale, queries, keys, heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, TWO_FRAMES: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of one head. Arguments as of the forward kernel, but that q comes rotated."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    head = (pid // blocks % heads).to(tl.int64)
    sample = (pid // (blocks * heads)).to(tl.int64)
    tile = tile_of(pid % blocks, sample, head, queries, BLOCK_M)
    chunk = open_chunk(frames, sample, queries, True)
    offset = keys - queries if mask is not None else 0
    columns = columns_of(rope, D, BLOCK_D)
    terms = _load_terms(incoming, tile, columns.v, queries, heads, cached.k.data.dtype.element_ty)

    GRAD_LSE: tl.constexpr = incoming.grad_lse is not None
    APART: tl.constexpr = sink_q is not None  # the segments are rotated back by different frames
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for segment in tl.static_range(2):
        tl.debug_barrier()  # keeps what the two segments share from being computed once and kept
        held = key_values_of(cached, sample, head // GROUP)
        if own is not None:
            if segment == 1:
                held = key_values_of(own, sample, head // GROUP)
        bounds = keys_of_queries(tile, segment, chunk, frames.tokens, mask, queries, keys, 0, BLOCK_M, BLOCK_N, 1)
        if APART and segment == 1:
            tile_q = load_tile(sink_q, tile, columns.k)
        else:
            tile_q = load_tile(q, tile, columns.k)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) if APART else result
        acc = _sweep_segment(
            acc, tile_q, terms, held, columns, bounds, scale * LOG2_E, mask is not None, GRAD_LSE, BLOCK_N, STAGES
        )
        if rope is not None:
            if APART or segment == 1:  # both segments of a chunk meet the same queries: rotated back once
                cos, sin = query_phases(
                    tile, offset, queries, chunk.first_frame, segment, frames.tokens, mask, rope, TWO_FRAMES, D, BLOCK_D
                )
                acc = rotate_tile(acc, cos, -sin, rope)
        if APART:
            result += acc
        else:
            result = acc
    within = tl.arange(0, BLOCK_M)
    grad = GRAD_Q + ((sample * queries + tile.first) * heads + head) * D
    grad += within[:, None] * (heads * D) + columns.k.at[None, :]
    exist = (within < queries - tile.first)[:, None] & columns.k.exist[None, :]
    tl.store(grad, narrow(result * scale, GRAD_Q.dtype.element_ty), mask=exist)
