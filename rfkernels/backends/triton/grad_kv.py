"""dK and dV by tiles of keys. Queries and keys come rotated; the gradient is rotated back before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .ranges import open_chunk, queries_of_keys, sees
from .rotation import phases, rotate_tile
from .structs import Incoming, KeyValues, Tile
from .tiling import LOG2_E, columns_of, dot, head_of, narrow, tokens_of


@triton.jit
def _load_terms(incoming, row, within, loads, MASKED: tl.constexpr, GRAD_LSE: tl.constexpr):
    """lse, delta and, if there is one, the normaliser's gradient of a tile's rows; MASKED: ``loads`` of them exist."""
    grad_lse = 0.0
    if MASKED:
        lse = tl.load(incoming.lse + row + within, mask=loads, other=float("-inf"))
        delta = tl.load(incoming.delta + row + within, mask=loads, other=0.0)
        if GRAD_LSE:
            grad_lse = tl.load(incoming.grad_lse + row + within, mask=loads, other=0.0)
    else:
        lse = tl.load(incoming.lse + row + within)
        delta = tl.load(incoming.delta + row + within)
        if GRAD_LSE:
            grad_lse = tl.load(incoming.grad_lse + row + within)
    return lse, delta, grad_lse


@triton.jit
def _sweep_queries(
    grads, k, v, q, incoming, queries, columns, begin, end, bounds, scale,
    MASKED: tl.constexpr, GRAD_LSE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK (but for the scale) and dV of query rows [begin, end) of a group's heads, one head after another.

    Scores are transposed, ``[keys, rows]``. Heads are no loop of their own: around this one it would make the
    accumulators change their layout in every iteration (sm_100).
    """
    grad_k, grad_v = grads
    grad_out = incoming.grad_out
    within = tl.arange(0, BLOCK_M)
    q_offsets = within[:, None] * q.step + columns.k.at[None, :]
    g_offsets = within[:, None] * grad_out.step + columns.v.at[None, :]
    q_base = q.first + tl.cast(begin, tl.int64) * q.step
    g_base = grad_out.first + tl.cast(begin, tl.int64) * grad_out.step
    count = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_M)
    row, head_row = begin, 0  # in the head; of all rows, the head's first
    for _ in tl.range(0, count * GROUP, num_stages=STAGES):
        q_loads, g_loads, loads = columns.k.exist[None, :], columns.v.exist[None, :], row + within < bounds.end
        if MASKED:
            q_loads, g_loads = loads[:, None] & q_loads, loads[:, None] & g_loads
        lse, delta, grad_lse = _load_terms(incoming, head_row + row, within, loads, MASKED, GRAD_LSE)
        tile_q = tl.load(q_base + q_offsets, mask=q_loads, other=0.0)
        tile_g = tl.load(g_base + g_offsets, mask=g_loads, other=0.0).to(v.dtype)
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        scores = dot(k, tl.trans(tile_q))
        weights = tl.math.exp2(scores * scale - lse2[None, :])
        if MASKED:
            weights = tl.where(sees(bounds, (row + within)[None, :], True), weights, 0.0)
        grad_v = dot(weights.to(v.dtype), tile_g, grad_v)
        grad_weights = dot(v, tl.trans(tile_g)) - delta[None, :]
        if GRAD_LSE:  # `backward.delta_kernel` left it out
            grad_weights += grad_lse[None, :]
        grad_k = dot((weights * grad_weights).to(k.dtype), tile_q, grad_k)
        row += BLOCK_M
        q_base += BLOCK_M * q.step
        g_base += BLOCK_M * grad_out.step
        if GROUP > 1:
            next_head = row >= end
            swept = tl.cast(row - begin, tl.int64)
            q_base += tl.where(next_head, q.head - swept * q.step, 0)
            g_base += tl.where(next_head, grad_out.head - swept * grad_out.step, 0)
            head_row += tl.where(next_head, queries, 0)
            row = tl.where(next_head, begin, row)
    return KeyValues(grad_k, grad_v)


@triton.jit
def _sweep_segment(
    grads, k, v, q, incoming, queries, columns, bounds, scale,
    ROW_BOUNDS: tl.constexpr, GRAD_LSE: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    if ROW_BOUNDS:
        grads = _sweep_queries(
            grads, k, v, q, incoming, queries, columns, bounds.begin, tl.minimum(bounds.start, bounds.end),
            bounds, scale, True, GRAD_LSE, GROUP, BLOCK_M, STAGES,
        )  # fmt: skip
    grads = _sweep_queries(
        grads, k, v, q, incoming, queries, columns, bounds.start, bounds.stop, bounds, scale, False, GRAD_LSE,
        GROUP, BLOCK_M, STAGES,
    )  # fmt: skip
    return _sweep_queries(
        grads, k, v, q, incoming, queries, columns, bounds.stop, bounds.end, bounds, scale, True, GRAD_LSE,
        GROUP, BLOCK_M, STAGES,
    )  # fmt: skip


@triton.jit
def _load_keys(x, sample, head, tile, columns, exist):
    first = head_of(x, sample, head) + tile.first.to(tl.int64) * x.token
    return tl.load(first + (tile.row[:, None] * x.token + columns.at[None, :]), mask=exist, other=0.0)


@triton.jit
def _incoming_of(incoming, sample, head, queries, heads):
    """What comes in for one head: `Tokens` of the gradient, pointers to row 0 of the rest."""
    at = (sample * heads + head) * queries
    grad_out = tokens_of(incoming.grad_out, sample, head)
    delta = incoming.delta + at
    grad_lse = delta  # not read: a function cannot return None below Triton 3.8
    if incoming.grad_lse is not None:
        grad_lse = incoming.grad_lse + at
    return Incoming(grad_out, incoming.lse + at, delta, grad_lse)


@triton.jit
def grad_kv_kernel(
    q, sink_q, key_values, incoming, GRAD_K, GRAD_V, frames, rope, mask, scale, queries, keys, kv_heads,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys of one KV head: all queries of the group that see them, in order.

    With a mask they are the keys of full sequences, else a chunk's own, seen by all its queries.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    key_head = (pid // blocks % kv_heads).to(tl.int64)
    sample = (pid // (blocks * kv_heads)).to(tl.int64)
    first_key = pid % blocks * BLOCK_N
    within = tl.arange(0, BLOCK_N)
    tile = Tile(sample, key_head, first_key, within)
    chunk = open_chunk(frames, sample, queries, True)
    columns = columns_of(rope, D, BLOCK_D)
    k_exist = (within < keys - first_key)[:, None] & columns.k.exist[None, :]
    v_exist = (within < keys - first_key)[:, None] & columns.v.exist[None, :]
    k = _load_keys(key_values.k, sample, key_head, tile, columns.k, k_exist)
    v = _load_keys(key_values.v, sample, key_head, tile, columns.v, v_exist)
    grads = KeyValues(tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_D], tl.float32))
    GRAD_LSE: tl.constexpr = incoming.grad_lse is not None

    for segment in tl.static_range(1 if mask is None else 2):
        bounds = queries_of_keys(tile, segment, chunk, mask, queries, keys, BLOCK_M, BLOCK_N)
        head = key_head * GROUP
        head_q = tokens_of(q, sample, head)
        if sink_q is not None:
            if segment == 1:
                head_q = tokens_of(sink_q, sample, head)
        head_incoming = _incoming_of(incoming, sample, head, queries, kv_heads * GROUP)
        grads = _sweep_segment(
            grads, k, v, head_q, head_incoming, queries, columns, bounds, scale * LOG2_E, mask is not None,
            GRAD_LSE, GROUP, BLOCK_M, STAGES,
        )  # fmt: skip

    grad_k, grad_v = grads
    grad_k = grad_k * scale
    if rope is not None:
        index = first_key + tl.minimum(within, keys - 1 - first_key)
        frame = index // frames.tokens + chunk.first_frame
        cos, sin = phases(frame[:, None], index % frames.tokens, rope, D, BLOCK_D)
        grad_k = rotate_tile(grad_k, cos, -sin, rope)
    absent = (within < chunk.missing - first_key)[:, None]
    at = ((sample * keys + first_key) * kv_heads + key_head) * D
    local = within[:, None] * (kv_heads * D)
    grad_k = narrow(tl.where(absent, 0.0, grad_k), GRAD_K.dtype.element_ty)
    grad_v = narrow(tl.where(absent, 0.0, grad_v), GRAD_V.dtype.element_ty)
    tl.store(GRAD_K + at + (local + columns.k.at[None, :]), grad_k, mask=k_exist)
    tl.store(GRAD_V + at + (local + columns.v.at[None, :]), grad_v, mask=v_exist)
