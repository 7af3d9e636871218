"""Attention backward: dQ by query tiles, dK and dV by key tiles, each entry by one program. No atomics.

Queries and keys come rotated (`cache.rotate`): queries are read once for each tile of keys. Gradients are turned back
before they are stored. Scores are recomputed from the normaliser.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rope import RopeTables
from . import tiles
from .cache import rotate
from .forward import LOG2_E, Keys, precision, query_phases
from .launch import FUSION, on_device, padded, rotary, rows
from .masks import interior, seeing_queries, visible_keys
from .rotation import head_columns, narrow, phases, rotate_tile

_DELTA_ROWS = 32


@triton.jit
def delta_kernel(
    OUT, GRAD_OUT, GRAD_LSE, DELTA, o_b, o_n, o_h, g_b, g_n, g_h, l_b, l_h, l_n, queries, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, AS_DOT: tl.constexpr,
):  # fmt: skip
    """``DELTA [B, H, N] = sum(out * grad_out) - grad_lse``.

    AS_DOT: summed in the order of the sweeps' ``grad_out @ v``: where a row sees one key they cancel exactly.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    row = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (pid // blocks % heads).to(tl.int64)
    sample = (pid // (blocks * heads)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    stored = row < queries
    mask = stored[:, None] & (columns < D)
    wide = row.to(tl.int64)[:, None]
    out = tl.load(OUT + sample * o_b + head * o_h + wide * o_n + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(GRAD_OUT + sample * g_b + head * g_h + wide * g_n + columns, mask=mask, other=0.0).to(tl.float32)
    grad_lse = tl.load(GRAD_LSE + sample * l_b + head * l_h + row * l_n, mask=stored, other=0.0)
    if AS_DOT:
        within = tl.arange(0, BLOCK_M)
        products = tl.dot(grad, tl.trans(out), input_precision="ieee")
        delta = tl.sum(tl.where(within[:, None] == within[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(out * grad, 1)
    tl.store(DELTA + (sample * heads + head) * queries + row, delta - grad_lse, mask=stored)


@triton.jit
def _sweep_keys(
    acc, q, grad_out, lse2, delta, k_base, v_base, k_step, v_step, k_column, k_columns, v_columns, start, stop, low,
    high, limit, scale2, MASKED: tl.constexpr, ROW_BOUNDS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
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
        grad_weights = tl.dot(grad_out, tl.trans(v), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision=PRECISION)
        k_base += BLOCK_N * k_step
        v_base += BLOCK_N * v_step
    return acc


@triton.jit
def grad_q_kernel(
    Q, SINK_Q, K, V, OWN_K, OWN_V, GRAD_OUT, LSE, DELTA, GRAD_Q, NUM_FRAMES, TURNS, SPATIAL,
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
                acc, q, grad_out, lse2, delta, k_base, v_base, k_step, v_step, q_columns, q_exists, exists,
                begin, tl.minimum(start, end), low, high, end, scale * LOG2_E, True, True, BLOCK_N, PRECISION, STAGES,
            )  # fmt: skip
        acc = _sweep_keys(
            acc, q, grad_out, lse2, delta, k_base, v_base, k_step, v_step, q_columns, q_exists, exists,
                start, stop, low, high,
            end, scale * LOG2_E, False, False, BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
        acc = _sweep_keys(
            acc, q, grad_out, lse2, delta, k_base, v_base, k_step, v_step, q_columns, q_exists, exists,
                stop, end, low, high,
            end, scale * LOG2_E, True, USE == "window", BLOCK_N, PRECISION, STAGES,
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


@triton.jit
def _sweep_queries(
    grad_k, grad_v, k, v, q_base, g_base, LSE, DELTA, q_step, g_step, k_column, k_columns, v_columns, start, stop, low,
    high, limit, scale2, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dK (but for the scale) and dV of query rows [start, stop); scores are transposed, ``[keys, rows]``."""
    within = tl.arange(0, BLOCK_M)
    q_offsets = within[:, None] * q_step + k_column[None, :]
    g_offsets = within[:, None] * g_step + tl.arange(0, grad_v.shape[1])[None, :]
    q_base += tl.cast(start, tl.int64) * q_step
    g_base += tl.cast(start, tl.int64) * g_step
    for row in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        q_loads, g_loads = k_columns[None, :], v_columns[None, :]
        if MASKED:
            known = row + within < limit
            q_loads, g_loads = known[:, None] & q_loads, known[:, None] & g_loads
            lse = tl.load(LSE + row + within, mask=known, other=float("-inf"))
            delta = tl.load(DELTA + row + within, mask=known, other=0.0)
        else:
            lse = tl.load(LSE + row + within)
            delta = tl.load(DELTA + row + within)
        q = tl.load(q_base + q_offsets, mask=q_loads, other=0.0)
        grad_out = tl.load(g_base + g_offsets, mask=g_loads, other=0.0).to(v.dtype)
        lse2 = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        scores = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        weights = tl.math.exp2(scores * scale2 - lse2[None, :])
        if MASKED:
            index = (row + within)[None, :]
            weights = tl.where((index >= low[:, None]) & (index < high[:, None]), weights, 0.0)
        grad_v = tl.dot(weights.to(v.dtype), grad_out, grad_v, input_precision=PRECISION)
        grad_weights = tl.dot(v, tl.trans(grad_out), input_precision=PRECISION)
        grad_scores = weights * (grad_weights - delta[None, :])
        grad_k = tl.dot(grad_scores.to(k.dtype), q, grad_k, input_precision=PRECISION)
        q_base += BLOCK_M * q_step
        g_base += BLOCK_M * g_step
    return grad_k, grad_v


@triton.jit
def grad_kv_kernel(
    Q, SINK_Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_K, GRAD_V, NUM_FRAMES, TURNS, SPATIAL,
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
    key = block * BLOCK_N + tl.arange(0, BLOCK_N)
    wide = key.to(tl.int64)[:, None]
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
    k_mask = (key < keys)[:, None] & q_exists[None, :]
    v_mask = (key < keys)[:, None] & exists[None, :]
    k = tl.load(K + sample * k_b + key_head * k_h + wide * k_n + q_columns[None, :], mask=k_mask, other=0.0)
    v = tl.load(V + sample * v_b + key_head * v_h + wide * v_n + columns[None, :], mask=v_mask, other=0.0)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    first_key = block * BLOCK_N
    last_key = tl.minimum(first_key + BLOCK_N, keys) - 1

    for turn in range(GROUP * (2 if USE == "window" else 1)):
        head = key_head * GROUP + turn % GROUP
        q_base = Q + sample * q_b + head * q_h
        q_step = q_n
        if USE == "window":
            outside = turn >= GROUP
            if outside:
                q_base = SINK_Q + sample * sq_b + head * sq_h
                q_step = sq_n
            begin, full_end = seeing_queries(
                first_key, outside, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            full_begin, end = seeing_queries(
                last_key, outside, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            # Of the tile only its first keys may be sinks: then its last key sees nobody, and every row needs the mask.
            end = tl.where(outside & (first_key < sink_tokens), keys, end)
            full_end = tl.where(outside & (last_key >= sink_tokens), 0, full_end)
            low, high = seeing_queries(
                key, outside, keys, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, OWN_CHUNK
            )
            # From indices in the sequence to rows.
            begin, full_begin = tl.maximum(begin - offset, 0), tl.maximum(full_begin - offset, 0)
            end, full_end = tl.maximum(end - offset, 0), tl.maximum(full_end - offset, 0)
            low, high = low - offset, high - offset
        else:
            begin, end = missing, queries + missing * 0
            full_begin, full_end = begin, end
            low = key * 0 + missing
            high = key * 0 + queries
        start, stop = interior(begin, end, full_begin, full_end, BLOCK_M)
        g_base = GRAD_OUT + sample * g_b + head * g_h
        row_lse = LSE + (sample * kv_heads * GROUP + head) * queries
        row_delta = DELTA + (sample * kv_heads * GROUP + head) * queries
        if USE == "window":
            grad_k, grad_v = _sweep_queries(
                grad_k, grad_v, k, v, q_base, g_base, row_lse, row_delta, q_step, g_n, q_columns, q_exists, exists,
                begin, tl.minimum(start, end), low, high, end, scale * LOG2_E, True, BLOCK_M, PRECISION, STAGES,
            )  # fmt: skip
        grad_k, grad_v = _sweep_queries(
            grad_k, grad_v, k, v, q_base, g_base, row_lse, row_delta, q_step, g_n, q_columns, q_exists, exists,
                start, stop, low, high, end, scale * LOG2_E, False, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip
        grad_k, grad_v = _sweep_queries(
            grad_k, grad_v, k, v, q_base, g_base, row_lse, row_delta, q_step, g_n, q_columns, q_exists, exists,
                stop, end, low, high, end, scale * LOG2_E, True, BLOCK_M, PRECISION, STAGES,
        )  # fmt: skip

    grad_k = grad_k * scale
    if ROPE:
        index = tl.minimum(key, keys - 1)
        cos, sin = phases(
            (index // frame_tokens + shift)[:, None], index % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS
        )
        grad_k = rotate_tile(grad_k, cos, -sin, HALF)
    absent = (key < missing)[:, None]
    at = ((sample * keys + wide) * kv_heads + key_head) * D
    tl.store(
        GRAD_K + at + q_columns[None, :], narrow(tl.where(absent, 0.0, grad_k), GRAD_K.dtype.element_ty), mask=k_mask
    )
    tl.store(
        GRAD_V + at + columns[None, :], narrow(tl.where(absent, 0.0, grad_v), GRAD_V.dtype.element_ty), mask=v_mask
    )


def gradients(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: Keys,
    rope: RopeTables | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in the dtypes of q, k, v (un-rotated); of a chunk's keys only its own get any."""
    batch, queries, heads, head_dim = q.shape
    dtype, mask = keys.v.dtype, keys.mask
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if queries == 0 or k.shape[1] == 0:
        return tuple(grad.zero_() for grad in grads)
    if mask is None:
        turned = sink_turned = rotate(q, rope, dtype, num_frames=keys.num_frames)
        own_k, own_v = keys.own_k, keys.own_v
        frame_tokens = keys.frame_tokens
    else:
        first = k.shape[1] - queries
        turned = sink_turned = rotate(q, rope, dtype, first_token=first)
        if rope is not None:
            sink_turned = rotate(q, rope, dtype, first_token=first, mask=mask)
        own_k, own_v = keys.k, keys.v
        frame_tokens = 1 if rope is None else rope.frame_tokens
    out, grad_out, grad_lse = rows(out), rows(grad_out), grad_lse.contiguous()
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    rotation, block_d = rotary(rope, q), padded(head_dim)
    counts = (0, 0, 1, 1, True) if mask is None else mask
    lengths = lse if keys.num_frames is None else keys.num_frames
    group, shape = heads // k.shape[2], {"D": head_dim, "BLOCK_D": block_d}

    def strides(*tensors: torch.Tensor) -> list[int]:
        return [stride for x in tensors for stride in x.stride()[:3]]

    def options(tile: tiles.Tile) -> dict:
        return shape | rotation.options | FUSION | {
            "USE": keys.use, "OWN_CHUNK": counts[4], "GROUP": group, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
            "STAGES": tile.stages, "PRECISION": precision(dtype), "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    with on_device(q):
        by_rows, by_keys = (
            tiles.backward_tile(tiles.architecture(), head_dim, dtype, keys.use, of) for of in ("queries", "keys")
        )
        as_dot = dtype == torch.float32  # in half precision v is rounded far more coarsely than these sums
        delta_rows = by_rows.rows if as_dot else _DELTA_ROWS
        delta_kernel[(triton.cdiv(queries, delta_rows) * heads * batch,)](
            out, grad_out, grad_lse, delta, *strides(out, grad_out, grad_lse), queries, heads, **shape,
            BLOCK_M=delta_rows, AS_DOT=as_dot, num_warps=4, **FUSION,
        )  # fmt: skip
        grad_q_kernel[(triton.cdiv(queries, by_rows.rows) * heads * batch,)](
            turned, sink_turned, keys.k, keys.v, own_k, own_v, grad_out, lse, delta, grads[0], lengths, rotation.turns,
            rotation.spatial, *strides(turned, sink_turned, keys.k, keys.v, own_k, own_v, grad_out), scale, queries,
            k.shape[1], heads, frame_tokens, keys.capacity, *counts[:4], TWO_FRAMES=frame_tokens >= by_rows.rows,
            **options(by_rows),
        )  # fmt: skip
        grad_kv_kernel[(triton.cdiv(k.shape[1], by_keys.keys) * k.shape[2] * batch,)](
            turned, sink_turned, own_k, own_v, grad_out, lse, delta, grads[1], grads[2], lengths, rotation.turns,
            rotation.spatial, *strides(turned, sink_turned, own_k, own_v, grad_out), scale, queries, k.shape[1],
            k.shape[2], frame_tokens, *counts[:4], **options(by_keys),
        )  # fmt: skip
    return grads
