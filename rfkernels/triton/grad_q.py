"""dQ by tiles of queries. Queries and keys come rotated; the gradient is turned back before it is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from .forward import LOG2_E
from .masks import interior, visible_keys
from .rotation import head_columns, narrow, query_phases, rotate_tile


@triton.jit
def _sweep_keys(
    acc, q, grad_out, lse2, delta, grad_lse, k_base, v_base, k_step, v_step, k_column, k_columns, v_columns, start,
    stop, low, high, limit, scale2,
    MASKED: tl.constexpr, ROW_BOUNDS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dQ (but for the scale) of keys [start, stop); masks as in the forward sweep."""
    within = tl.arange(0, BLOCK_N)
    k_offsets = within[:, None] * k_step + k_column[None, :]
    v_offsets = within[:, None] * v_step + tl.arange(0, acc.shape[1])[None, :]
    k_base += tl.cast(start, tl.int64) * k_step
    v_base += tl.cast(start, tl.int64) * v_step
    for key in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        k_loads, v_loads = k_columns[None, :], v_columns[None, :]
        if MASKED:
            loads = (key + within < limit)[:, None]
            k_loads, v_loads = loads & k_loads, loads & v_loads
        k = tl.load(k_base + k_offsets, mask=k_loads, other=0.0)
        v = tl.load(v_base + v_offsets, mask=v_loads, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        weights = tl.math.exp2(scores * scale2 - lse2[:, None])
        if MASKED:
            index = (key + within)[None, :]
            if ROW_BOUNDS:
                seen = (index >= low[:, None]) & (index < high[:, None])
            else:
                seen = index < limit
            weights = tl.where(seen, weights, 0.0)
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION) - delta[:, None]
        if PRECISION == "ieee":  # `backward.delta_kernel` left it out
            grad_weights += grad_lse[:, None]
        acc = tl.dot((weights * grad_weights).to(k.dtype), k, acc, input_precision=PRECISION)
        k_base += BLOCK_N * k_step
        v_base += BLOCK_N * v_step
    return acc


@triton.jit
def grad_q_kernel(
    Q, SINK_Q, K, V, OWN_K, OWN_V, GRAD_OUT, LSE, DELTA, GRAD_LSE, GRAD_Q, NUM_FRAMES, TURNS, SPATIAL,
    q_b, q_n, q_h, sq_b, sq_n, sq_h, k_b, k_n, k_h, v_b, v_n, v_h, ok_b, ok_n, ok_h, ov_b, ov_n, ov_h, g_b, g_n, g_h,
    scale, queries, keys, heads, frame_tokens, capacity, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
    USE: tl.constexpr, OWN_CHUNK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TWO_FRAMES: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of one head. USE "chunk" or "window", as in the forward kernel."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    block = pid % blocks
    head = (pid // blocks % heads).to(tl.int64)
    sample = (pid // (blocks * heads)).to(tl.int64)
    key_head = head // GROUP
    # Rows are counted from the tile's first, in 32 bits, as in the forward kernel.
    first = block * BLOCK_M
    wide_first = first.to(tl.int64)
    within = tl.arange(0, BLOCK_M)
    known = tl.minimum(within, queries - 1 - first)
    first_row = first + (keys - queries if USE == "window" else 0)  # indices in the sequence
    last_row = tl.minimum(first + BLOCK_M, queries) - 1 + (keys - queries if USE == "window" else 0)
    frames, num_frames, missing, valid = 0, 0, 0, 0
    if USE == "chunk":
        num_frames = tl.load(NUM_FRAMES + sample).to(tl.int32)
        frames = queries // frame_tokens
        missing = tl.maximum(frames - num_frames, 0) * frame_tokens
        valid = tl.maximum(tl.minimum(num_frames, capacity) - frames, 0)

    q_columns, q_exists = head_columns(D, BLOCK_D, HALF)
    columns = tl.arange(0, BLOCK_D)
    exists = columns < D
    grad_out = tl.load(
        GRAD_OUT + sample * g_b + head * g_h + wide_first * g_n + (known[:, None] * g_n + columns[None, :]),
        mask=exists[None, :], other=0.0,
    ).to(K.dtype.element_ty)  # fmt: skip
    at = (sample * heads + head) * queries + first + known
    lse = tl.load(LSE + at)
    # Rows that see nothing have -inf: +inf instead makes their weights zero.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(DELTA + at)
    grad_lse = delta
    if PRECISION == "ieee":
        grad_lse = tl.load(GRAD_LSE + at)

    APART: tl.constexpr = ROPE and USE == "window"  # the two ranges are turned back by different frames
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in tl.static_range(2):
        tl.debug_barrier()  # keeps what the two turns share from being computed once and kept
        q_ptrs = Q + sample * q_b + head * q_h + wide_first * q_n + (known[:, None] * q_n + q_columns[None, :])
        k_base, v_base, k_step, v_step = K + sample * k_b + key_head * k_h, V + sample * v_b + key_head * v_h, k_n, v_n
        low, high = known, known
        if USE == "window":
            if part == 1:
                q_ptrs = SINK_Q + sample * sq_b + head * sq_h + wide_first * sq_n
                q_ptrs += known[:, None] * sq_n + q_columns[None, :]
            begin, full_end = visible_keys(
                first_row, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            full_begin, end = visible_keys(
                last_row, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            low, high = visible_keys(
                first_row + known, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
                OWN_CHUNK,
            )  # fmt: skip
        else:
            begin = missing * part
            end = valid * frame_tokens
            if part == 1:
                end = queries
                k_base = OWN_K + sample * ok_b + key_head * ok_h
                v_base = OWN_V + sample * ov_b + key_head * ov_h
                k_step, v_step = ok_n, ov_n
            end = tl.where(first + BLOCK_M <= missing, begin, end)
            full_begin, full_end = begin, end
        start, stop = interior(begin, end, full_begin, full_end, BLOCK_N)
        q = tl.load(q_ptrs, mask=q_exists[None, :], other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) if APART else result
        if USE == "window":
            acc = _sweep_keys(
                acc, q, grad_out, lse2, delta, grad_lse, k_base, v_base, k_step, v_step, q_columns, q_exists,
                exists, begin, tl.minimum(start, end), low, high, end, scale * LOG2_E, True, True, BLOCK_N, PRECISION,
                STAGES,
            )  # fmt: skip
        acc = _sweep_keys(
            acc, q, grad_out, lse2, delta, grad_lse, k_base, v_base, k_step, v_step, q_columns, q_exists,
            exists, start, stop, low, high, end, scale * LOG2_E, False, False, BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
        acc = _sweep_keys(
            acc, q, grad_out, lse2, delta, grad_lse, k_base, v_base, k_step, v_step, q_columns, q_exists,
            exists, stop, end, low, high, end, scale * LOG2_E, True, USE == "window", BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
        if ROPE and (USE == "window" or part == 1):  # both ranges of a chunk meet the same queries: turned back once
            cos, sin = query_phases(
                first_row, last_row, first_row + known, num_frames - frames, part, frame_tokens, sink_tokens,
                window_tokens, chunk_tokens, first_chunk_tokens, TURNS, SPATIAL, USE, TWO_FRAMES, D, BLOCK_D,
                FRAME_PAIRS,
            )  # fmt: skip
            acc = rotate_tile(acc, cos, -sin, HALF)
        if APART:
            result += acc
        else:
            result = acc
    grad = GRAD_Q + ((sample * queries + first) * heads + head) * D
    grad += within[:, None] * (heads * D) + q_columns[None, :]
    mask = (within < queries - first)[:, None] & q_exists[None, :]
    tl.store(grad, narrow(result * scale, GRAD_Q.dtype.element_ty), mask=mask)
