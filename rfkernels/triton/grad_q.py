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
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    known = tl.minimum(row, queries - 1)
    wide = known.to(tl.int64)[:, None]
    first_row = block * BLOCK_M
    last_row = tl.minimum(first_row + BLOCK_M, queries) - 1
    offset = keys - queries if USE == "window" else 0
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
        GRAD_OUT + sample * g_b + head * g_h + wide * g_n + columns[None, :], mask=exists[None, :], other=0.0
    ).to(K.dtype.element_ty)
    at = (sample * heads + head) * queries + known
    lse = tl.load(LSE + at)
    # Rows that see nothing have -inf: +inf instead makes their weights zero.
    lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
    delta = tl.load(DELTA + at)
    grad_lse = delta
    if PRECISION == "ieee":
        grad_lse = tl.load(GRAD_LSE + at)

    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for part in range(2):
        tl.debug_barrier()  # keeps what the two turns share from being computed before the loop and kept there
        q_ptrs = Q + sample * q_b + head * q_h + wide * q_n + q_columns[None, :]
        k_base, v_base, k_step, v_step = K + sample * k_b + key_head * k_h, V + sample * v_b + key_head * v_h, k_n, v_n
        low, high = row, row
        if USE == "window":
            if part == 1:
                q_ptrs = SINK_Q + sample * sq_b + head * sq_h + wide * sq_n + q_columns[None, :]
            begin, full_end = visible_keys(
                first_row + offset, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
                OWN_CHUNK,
            )  # fmt: skip
            full_begin, end = visible_keys(
                last_row + offset, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
                OWN_CHUNK,
            )  # fmt: skip
            low, high = visible_keys(
                known + offset, part == 1, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
        else:
            begin = missing * part
            end = valid * frame_tokens
            if part == 1:
                end = missing * 0 + queries
                k_base = OWN_K + sample * ok_b + key_head * ok_h
                v_base = OWN_V + sample * ov_b + key_head * ov_h
                k_step, v_step = ok_n, ov_n
            end = tl.where(first_row + BLOCK_M <= missing, begin, end)
            full_begin, full_end = begin, end
        start, stop = interior(begin, end, full_begin, full_end, BLOCK_N)
        q = tl.load(q_ptrs, mask=q_exists[None, :], other=0.0)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
        if ROPE:
            if USE == "window" or part == 1:  # both ranges of a chunk meet the same queries: turned back once
                turned = acc
                if USE == "chunk":
                    turned += result
                cos, sin = query_phases(
                    first_row + offset, last_row + offset, known + offset, num_frames - frames, part, frame_tokens,
                    sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, TURNS, SPATIAL, USE, TWO_FRAMES, D,
                    BLOCK_D, FRAME_PAIRS,
                )  # fmt: skip
                turned = rotate_tile(turned, cos, -sin, HALF)
                if USE == "window":
                    turned += result
                result = turned
            else:
                result = acc
        else:
            result += acc
    grad = GRAD_Q + ((sample * queries + row.to(tl.int64)[:, None]) * heads + head) * D + q_columns[None, :]
    mask = (row < queries)[:, None] & q_exists[None, :]
    tl.store(grad, narrow(result * scale, GRAD_Q.dtype.element_ty), mask=mask)
