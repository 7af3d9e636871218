"""Attention forward: one kernel for the cache's prefix, for past and open chunk, and for the sink-window mask."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..geometry import WindowMask
from ..rope import RopeTables
from . import tiles
from .cache import rotate
from .launch import ALL_REGISTERS, FUSION, on_device, padded, pointwise_rows, rotary, rows
from .masks import interior, share, visible_keys
from .rotation import head_columns, narrow, query_phases, rotate_tile

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sweep(
    acc, total, top, q, k_base, v_base, k_step, v_step, k_column, k_columns, v_columns, start, stop, low, high, limit,
    scale,
    MASKED: tl.constexpr, ROW_BOUNDS: tl.constexpr, PADDED: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Keys [start, stop) of one range, in tiles: online softmax in base 2.

    MASKED: nothing is seen or loaded from ``limit`` on, and with ROW_BOUNDS a row sees [low, high) only. Otherwise
    every row sees every key and the loop holds no mask (but for the padding of a head). ``total [rows, 8]`` adds keys
    up by their number modulo 8, which one thread holds: the sum across threads is left for the end.
    """
    within = tl.arange(0, BLOCK_N)
    # A moving scalar base and fixed 32-bit offsets: pointers to every row would take twice the registers. Unsigned:
    # sign extension would cost instructions in the loop.
    k_offsets = (within[:, None] * k_step + k_column[None, :]).to(tl.uint32)
    v_offsets = (within[:, None] * v_step + tl.arange(0, acc.shape[1])[None, :]).to(tl.uint32)
    k_base += tl.cast(start, tl.int64) * k_step
    v_base += tl.cast(start, tl.int64) * v_step
    for key in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        if MASKED:
            loads = (key + within < limit)[:, None]
            k = tl.load(k_base + k_offsets, mask=loads & k_columns[None, :], other=0.0)
        elif PADDED:
            k = tl.load(k_base + k_offsets, mask=k_columns[None, :], other=0.0)
        else:
            k = tl.load(k_base + k_offsets)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            index = (key + within)[None, :]
            if ROW_BOUNDS:
                seen = (index >= low[:, None]) & (index < high[:, None])
            else:
                seen = index < limit
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
            v = tl.load(v_base + v_offsets, mask=loads & v_columns[None, :], other=0.0)
        elif PADDED:
            v = tl.load(v_base + v_offsets, mask=v_columns[None, :], other=0.0)
        else:
            v = tl.load(v_base + v_offsets)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        top = new
        k_base += BLOCK_N * k_step
        v_base += BLOCK_N * v_step
    return acc, total, top


@triton.jit
def forward_kernel(
    Q, SINK_Q, K, V, OWN_K, OWN_V, OUT, LSE, NUM_FRAMES, TURNS, SPATIAL,
    q_b, q_n, q_h, sq_b, sq_n, sq_h, k_b, k_n, k_h, v_b, v_n, v_h, ok_b, ok_n, ok_h, ov_b, ov_n, ov_h,
    scale, queries, keys, heads, frame_tokens, capacity, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens,
    USE: tl.constexpr, OWN_CHUNK: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    TWO_FRAMES: tl.constexpr, ROPE: tl.constexpr, ROTATED: tl.constexpr, HALF: tl.constexpr, FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """A program owns BLOCK_M queries of one head, and one share of the keys they see.

    USE "prefix": keys are the first ``min(num_frames, capacity)`` frames of K. "chunk": those but for the open frames,
    then the chunk's own. "window": the ranges of `masks.visible_keys`. Queries are rotated here, at their frame, unless
    they come ROTATED; SINK_Q are those for sinks outside the window, rotated before.
    """
    pid = tl.program_id(0)
    split = tl.program_id(1)
    blocks = tl.cdiv(queries, BLOCK_M)
    block = pid % blocks
    head = pid // blocks % heads
    sample = pid // (blocks * heads)
    batch = tl.num_programs(0) // (blocks * heads)
    wide_head, wide_sample = head.to(tl.int64), sample.to(tl.int64)
    key_head = wide_head // GROUP

    # Rows are counted from the tile's first, in 32 bits: indices in the sequence would be kept for the last store.
    first = block * BLOCK_M
    within = tl.arange(0, BLOCK_M)
    known = tl.minimum(within, queries - 1 - first)  # rows past the end repeat the last one and are not stored
    offset = keys - queries if USE == "window" else 0
    frames, num_frames = 0, 0
    missing = 0  # rows of frames that a young stream does not have
    if USE != "window":
        num_frames = tl.load(NUM_FRAMES + sample).to(tl.int32)
        frames = queries // frame_tokens
        missing = tl.maximum(frames - num_frames, 0) * frame_tokens
        valid = tl.minimum(num_frames, capacity)
        if USE == "chunk":
            valid = tl.maximum(valid - frames, 0)

    q_columns, q_exists = head_columns(D, BLOCK_D, HALF)
    columns = tl.arange(0, BLOCK_D)
    exists = columns < D
    k_head = K + wide_sample * k_b + key_head * k_h
    v_head = V + wide_sample * v_b + key_head * v_h
    scale2 = scale * LOG2_E

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M, 8], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    q = tl.load(
        Q + wide_sample * q_b + wide_head * q_h + first.to(tl.int64) * q_n
        + (known[:, None] * q_n + q_columns[None, :]),
        mask=q_exists[None, :], other=0.0,
    )  # fmt: skip
    if ROPE and not ROTATED:
        cos, sin = query_phases(
            first + offset, tl.minimum(first + BLOCK_M, queries) - 1 + offset, first + known + offset,
            num_frames - frames, 0, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, TURNS,
            SPATIAL, USE, TWO_FRAMES, D, BLOCK_D, FRAME_PAIRS,
        )  # fmt: skip
        q = rotate_tile(q, cos, sin, HALF)
    q = narrow(q, K.dtype.element_ty)
    # Masks need registers: edges go in smaller tiles, which also waste fewer keys.
    EDGE_N: tl.constexpr = min(BLOCK_N // 2, 32)
    # Two ranges of keys: past and own chunk, or window and sinks outside it. Unrolled: sweeps inside another loop would
    # take the accumulator's layout from it, and convert it in every turn (sm_100).
    for part in tl.static_range(1 if USE == "prefix" else 2):
        k_base, v_base, k_step, v_step = k_head, v_head, k_n, v_n
        low, high = known, known
        if USE == "window":
            first_row = first + offset
            last_row = tl.minimum(first + BLOCK_M, queries) - 1 + offset
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
            if USE == "chunk":
                if part == 1:
                    end = queries
                    k_base = OWN_K + wide_sample * ok_b + key_head * ok_h
                    v_base = OWN_V + wide_sample * ov_b + key_head * ov_h
                    k_step, v_step = ok_n, ov_n
            end = tl.where(first + BLOCK_M <= missing, begin, end)  # nobody here to attend
            full_begin, full_end = begin, end
        limit = end
        begin, end = share(begin, end, split, BLOCK_N, SPLITS)
        start, stop = interior(begin, end, full_begin, full_end, BLOCK_N)
        if USE == "window":
            acc, total, top = _sweep(
                acc, total, top, q, k_base, v_base, k_step, v_step, q_columns, q_exists, exists,
                begin, tl.minimum(start, end), low, high, limit, scale2, True, True, D != BLOCK_D, EDGE_N, PRECISION,
                STAGES,
            )  # fmt: skip
        acc, total, top = _sweep(
            acc, total, top, q, k_base, v_base, k_step, v_step, q_columns, q_exists, exists, start, stop,
            low, high, limit, scale2, False, False, D != BLOCK_D, BLOCK_N, PRECISION, STAGES,
        )  # fmt: skip
        acc, total, top = _sweep(
            acc, total, top, q, k_base, v_base, k_step, v_step, q_columns, q_exists, exists, stop, end,
            low, high, limit, scale2, True, USE == "window", D != BLOCK_D, EDGE_N, PRECISION, STAGES,
        )  # fmt: skip
        if ROPE and USE == "window" and part == 0:  # sinks outside the window meet the queries in another rotation
            tl.debug_barrier()  # or the load moves before the sweeps, where its registers are missing
            sink_q = SINK_Q + wide_sample * sq_b + wide_head * sq_h + first.to(tl.int64) * sq_n
            sink_q += known[:, None] * sq_n + q_columns[None, :]
            q = tl.load(sink_q, mask=q_exists[None, :], other=0.0)

    total = tl.sum(total, 1)
    empty = (total == 0.0) | (first + within < missing)
    out = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    lse = tl.where(empty, float("-inf"), (top + tl.math.log2(tl.where(empty, 1.0, total))) * LN_2)
    place = (split * batch + sample).to(tl.int64)
    stored = within < queries - first
    # First: after the other store, one more register would be held through all sweeps.
    tl.store(LSE + (place * heads + head) * queries + first + within, lse, mask=stored)
    tl.store(
        OUT + ((place * queries + first) * heads + head) * D + (within[:, None] * (heads * D) + columns[None, :]),
        narrow(out, OUT.dtype.element_ty), mask=stored[:, None] & exists[None, :],
    )  # fmt: skip


@triton.jit
def merge_kernel(
    PARTS, PART_LSE, OUT, LSE, queries, heads,
    SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Joins the SPLITS results ``[SPLITS, B, N, H, D]`` of disjoint keys by their normalisers ``[SPLITS, B, H, N]``."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    row = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = pid // blocks % heads
    sample = (pid // (blocks * heads)).to(tl.int64)
    batch = tl.num_programs(0) // (blocks * heads)
    columns = tl.arange(0, BLOCK_D)
    stored = row < queries
    mask = stored[:, None] & (columns < D)[None, :]
    at_lse = PART_LSE + (sample * heads + head) * queries + row
    at_out = PARTS + (((sample * queries + row) * heads + head) * D)[:, None] + columns[None, :]
    step = tl.cast(batch, tl.int64) * heads * queries
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(at_lse + split * step, mask=stored, other=0.0))
    empty = top == float("-inf")
    top = tl.where(empty, 0.0, top)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in tl.static_range(SPLITS):
        weight = tl.math.exp2((tl.load(at_lse + split * step, mask=stored, other=0.0) - top) * LOG2_E)
        total += weight
        acc += weight[:, None] * tl.load(at_out + split * step * D, mask=mask, other=0.0)
    total = tl.where(empty, 1.0, total)
    lse = tl.where(empty, float("-inf"), top + tl.math.log2(total) * LN_2)
    out = ((sample * queries + row) * heads + head) * D
    tl.store(OUT + out[:, None] + columns[None, :], narrow(acc / total[:, None], OUT.dtype.element_ty), mask=mask)
    tl.store(LSE + (sample * heads + head) * queries + row, lse, mask=stored)


class Keys(NamedTuple):
    """k, v ``[B, N_k, H_kv, D]`` of one dtype, keys rotated; for a chunk also its own, and num_frames on the device."""

    k: torch.Tensor
    v: torch.Tensor
    own_k: torch.Tensor | None = None
    own_v: torch.Tensor | None = None
    num_frames: torch.Tensor | None = None
    capacity: int = 0
    frame_tokens: int = 1
    mask: WindowMask | None = None

    @property
    def use(self) -> str:
        if self.mask is not None:
            return "window"
        return "prefix" if self.own_k is None else "chunk"

    @property
    def longest(self) -> int:
        """Keys that one query may see, at most."""
        if self.mask is None:
            return self.k.shape[1] + (0 if self.own_k is None else self.own_k.shape[1])
        return min(self.k.shape[1], self.mask.sink_tokens + self.mask.window_tokens)


def precision(dtype: torch.dtype) -> str:
    """float32 products are exact (``ieee``): TF32 would not be the float32 that was asked for."""
    return "ieee" if dtype == torch.float32 else "tf32"


def attend(q: torch.Tensor, keys: Keys, rope: RopeTables | None, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """q ``[B, N_q, H_q, D]``, un-rotated. Returns out in k's dtype and lse float32 ``[B, H_q, N_q]``."""
    q = rows(q)
    if scale < 0:  # the running maximum needs a positive one
        q, scale = -q, -scale
    batch, queries, heads, head_dim = q.shape
    k, v = keys.k, keys.v
    own_k, own_v = (k, v) if keys.own_k is None else (keys.own_k, keys.own_v)
    out = torch.empty(q.shape, dtype=k.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    sink_q = q
    first_token = 0 if keys.mask is None else k.shape[1] - queries
    if rope is not None and keys.mask is not None:  # between the two ranges of keys it would cost spilled registers
        sink_q = rotate(q, rope, k.dtype, first_token=first_token, mask=keys.mask)
    # Where every pair turns with the token, there is an angle for each element: those spill too, and made Triton choose
    # layouts of Q and K that tensor cores cannot load at once.
    rotated = rope is not None and rope.spatial.shape[1] == 0
    if rotated:
        q = rotate(q, rope, k.dtype, num_frames=keys.num_frames, first_token=first_token)
    rotation = rotary(rope, q)
    block_d = padded(head_dim)
    with on_device(q):
        kind = (tiles.architecture(), head_dim, k.dtype, keys.use)
        tile = tiles.forward_tile(*kind, rope=rope is not None, shared=False)
        programs = triton.cdiv(queries, tile.rows) * heads * batch
        splits = tiles.splits(programs, keys.longest, tile, tiles.processors(q.device))
        parts, part_lse = out, lse
        if splits > 1:
            tile = tiles.forward_tile(*kind, rope=rope is not None, shared=True)  # as many rows
            parts, part_lse = (torch.empty(splits, *x.shape, dtype=torch.float32, device=q.device) for x in (out, lse))
        mask = (0, 0, 1, 1, True) if keys.mask is None else keys.mask
        frame_tokens = rope.frame_tokens if rope is not None and keys.mask is not None else keys.frame_tokens
        tensors = (q, sink_q, k, v, own_k, own_v)
        forward_kernel[(programs, splits)](
            *tensors, parts, part_lse, q if keys.num_frames is None else keys.num_frames, rotation.turns,
            rotation.spatial, *(stride for x in tensors for stride in x.stride()[:3]), scale, queries, k.shape[1],
            heads, frame_tokens, keys.capacity, *mask[:4], USE=keys.use, OWN_CHUNK=mask[4], GROUP=heads // k.shape[2],
            D=head_dim, BLOCK_D=block_d, BLOCK_M=tile.rows, BLOCK_N=tile.keys, SPLITS=splits,
            PRECISION=precision(k.dtype), STAGES=tile.stages, TWO_FRAMES=frame_tokens >= tile.rows,
            ROTATED=rotated, **rotation.options, num_warps=tile.warps, num_stages=tile.stages, **FUSION,
            **(ALL_REGISTERS if k.dtype == torch.float32 or block_d > 128 else {}),
        )  # fmt: skip
        if splits > 1:
            merged = pointwise_rows(block_d)
            merge_kernel[(triton.cdiv(queries, merged) * heads * batch,)](
                parts, part_lse, out, lse, queries, heads, SPLITS=splits, D=head_dim, BLOCK_D=block_d, BLOCK_M=merged,
                num_warps=4, **FUSION,
            )  # fmt: skip
    return out, lse
