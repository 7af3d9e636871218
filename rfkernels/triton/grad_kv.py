"""dK and dV by tiles of keys. Queries and keys come rotated; the gradient is turned back before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOG2_E
from .masks import interior, seeing_queries
from .rotation import head_columns, narrow, phases, rotate_tile


@triton.jit
def _sweep_queries(
    grad_k, grad_v, k, v, q_base, g_base, LSE, DELTA, GRAD_LSE, q_step, g_step, q_head, g_head, queries, k_column,
    k_columns, v_columns, start, stop, low, high, limit, scale2,
    MASKED: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK (but for the scale) and dV of query rows [start, stop) of a group's heads, one head after another.

    Scores are transposed, ``[keys, rows]``. Heads are no loop of their own: around this one it would make the
    accumulators change their layout in every turn (sm_100).
    """
    within = tl.arange(0, BLOCK_M)
    q_offsets = within[:, None] * q_step + k_column[None, :]
    g_offsets = within[:, None] * g_step + tl.arange(0, grad_v.shape[1])[None, :]
    q_base += tl.cast(start, tl.int64) * q_step
    g_base += tl.cast(start, tl.int64) * g_step
    count = tl.cdiv(tl.maximum(stop - start, 0), BLOCK_M)
    row = start
    for _ in tl.range(0, count * GROUP, num_stages=STAGES):
        q_loads, g_loads = k_columns[None, :], v_columns[None, :]
        if MASKED:
            known = row + within < limit
            q_loads, g_loads = known[:, None] & q_loads, known[:, None] & g_loads
            lse = tl.load(LSE + row + within, mask=known, other=float("-inf"))
            delta = tl.load(DELTA + row + within, mask=known, other=0.0)
            if PRECISION == "ieee":
                grad_lse = tl.load(GRAD_LSE + row + within, mask=known, other=0.0)
        else:
            lse = tl.load(LSE + row + within)
            delta = tl.load(DELTA + row + within)
            if PRECISION == "ieee":
                grad_lse = tl.load(GRAD_LSE + row + within)
        q = tl.load(q_base + q_offsets, mask=q_loads, other=0.0)
        grad_out = tl.load(g_base + g_offsets, mask=g_loads, other=0.0).to(v.dtype)
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = tl.math.exp2(scores * scale2 - lse2[None, :])
        if MASKED:
            index = (row + within)[None, :]
            weights = tl.where((index >= low[:, None]) & (index < high[:, None]), weights, 0.0)
        grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :]
        if PRECISION == "ieee":  # `backward.delta_kernel` left it out
            grad_weights += grad_lse[None, :]
        grad_k = tl.dot((weights * grad_weights).to(k.dtype), q, grad_k, input_precision=PRECISION)
        row += BLOCK_M
        q_base += BLOCK_M * q_step
        g_base += BLOCK_M * g_step
        if GROUP > 1:
            next_head = row >= stop
            swept = tl.cast(row - start, tl.int64)
            q_base += tl.where(next_head, q_head - swept * q_step, 0)
            g_base += tl.where(next_head, g_head - swept * g_step, 0)
            LSE += tl.where(next_head, queries, 0)
            DELTA += tl.where(next_head, queries, 0)
            GRAD_LSE += tl.where(next_head, queries, 0)
            row = tl.where(next_head, start, row)
    return grad_k, grad_v


@triton.jit
def grad_kv_kernel(
    Q, SINK_Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_LSE, GRAD_K, GRAD_V, NUM_FRAMES, TURNS, SPATIAL,
    q_b, q_n, q_h, sq_b, sq_n, sq_h, k_b, k_n, k_h, v_b, v_n, v_h, g_b, g_n, g_h,
    scale, queries, keys, kv_heads, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
    USE: tl.constexpr, OWN_CHUNK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    ROPE: tl.constexpr, HALF: tl.constexpr, FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_N keys of one KV head: all queries of the group that see them, in order.

    USE "chunk": the open chunk's own keys, seen by all its queries. "window": the ranges of `masks.seeing_queries`.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(keys, BLOCK_N)
    block = pid % blocks
    key_head = (pid // blocks % kv_heads).to(tl.int64)
    sample = (pid // (blocks * kv_heads)).to(tl.int64)
    # Keys are counted from the tile's first, in 32 bits, as rows are in the forward kernel.
    first_key = block * BLOCK_N
    wide_first = first_key.to(tl.int64)
    within = tl.arange(0, BLOCK_N)
    offset = keys - queries
    missing = 0
    shift = 0
    if USE == "chunk":
        num_frames = tl.load(NUM_FRAMES + sample).to(tl.int32)
        shift = num_frames - queries // frame_tokens
        missing = tl.maximum(-shift, 0) * frame_tokens
    q_columns, q_exists = head_columns(D, BLOCK_D, HALF)
    columns = tl.arange(0, BLOCK_D)
    exists = columns < D
    k_mask = (within < keys - first_key)[:, None] & q_exists[None, :]
    v_mask = (within < keys - first_key)[:, None] & exists[None, :]
    k_base = K + sample * k_b + key_head * k_h + wide_first * k_n
    v_base = V + sample * v_b + key_head * v_h + wide_first * v_n
    k = tl.load(k_base + (within[:, None] * k_n + q_columns[None, :]), mask=k_mask, other=0.0)
    v = tl.load(v_base + (within[:, None] * v_n + columns[None, :]), mask=v_mask, other=0.0)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    last_key = tl.minimum(first_key + BLOCK_N, keys) - 1

    for part in tl.static_range(2 if USE == "window" else 1):
        q_sample, q_step, q_head = Q + sample * q_b, q_n, q_h
        if USE == "window":
            if part == 1:
                q_sample, q_step, q_head = SINK_Q + sample * sq_b, sq_n, sq_h
            begin, full_end = seeing_queries(
                first_key, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            full_begin, end = seeing_queries(
                last_key, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            if part == 1:
                # Only the tile's first keys may be sinks: then its last key sees nobody, and every row needs the mask.
                end = tl.where(first_key < sink_tokens, keys, end)
                full_end = tl.where(last_key >= sink_tokens, 0, full_end)
            low, high = seeing_queries(
                first_key + within, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
                OWN_CHUNK,
            )  # fmt: skip
            # From indices in the sequence to rows.
            begin, full_begin = tl.maximum(begin - offset, 0), tl.maximum(full_begin - offset, 0)
            end, full_end = tl.maximum(end - offset, 0), tl.maximum(full_end - offset, 0)
            low, high = low - offset, high - offset
        else:
            begin, end = missing, queries
            full_begin, full_end = begin, end
            low = within * 0 + missing
            high = within * 0 + queries
        start, stop = interior(begin, end, full_begin, full_end, BLOCK_M)
        head = key_head * GROUP
        q_base = q_sample + head * q_head
        g_base = GRAD_OUT + sample * g_b + head * g_h
        at_row = (sample * kv_heads * GROUP + head) * queries
        if USE == "window":
            grad_k, grad_v = _sweep_queries(
                grad_k, grad_v, k, v, q_base, g_base, LSE + at_row, DELTA + at_row, GRAD_LSE + at_row, q_step, g_n,
                q_head, g_h, queries, q_columns, q_exists, exists, begin, tl.minimum(start, end), low, high, end,
                scale * LOG2_E, True, GROUP, BLOCK_M, PRECISION, STAGES,
            )  # fmt: skip
        grad_k, grad_v = _sweep_queries(
            grad_k, grad_v, k, v, q_base, g_base, LSE + at_row, DELTA + at_row, GRAD_LSE + at_row, q_step, g_n,
            q_head, g_h, queries, q_columns, q_exists, exists, start, stop, low, high, end, scale * LOG2_E, False,
            GROUP, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip
        grad_k, grad_v = _sweep_queries(
            grad_k, grad_v, k, v, q_base, g_base, LSE + at_row, DELTA + at_row, GRAD_LSE + at_row, q_step, g_n,
            q_head, g_h, queries, q_columns, q_exists, exists, stop, end, low, high, end, scale * LOG2_E, True,
            GROUP, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip

    grad_k = grad_k * scale
    if ROPE:
        index = first_key + tl.minimum(within, keys - 1 - first_key)
        cos, sin = phases(
            (index // frame_tokens + shift)[:, None], index % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS
        )
        grad_k = rotate_tile(grad_k, cos, -sin, HALF)
    absent = (within < missing - first_key)[:, None]
    at = ((sample * keys + first_key) * kv_heads + key_head) * D
    local = within[:, None] * (kv_heads * D)
    grad_k = narrow(tl.where(absent, 0.0, grad_k), GRAD_K.dtype.element_ty)
    grad_v = narrow(tl.where(absent, 0.0, grad_v), GRAD_V.dtype.element_ty)
    tl.store(GRAD_K + at + (local + q_columns[None, :]), grad_k, mask=k_mask)
    tl.store(GRAD_V + at + (local + columns[None, :]), grad_v, mask=v_mask)
