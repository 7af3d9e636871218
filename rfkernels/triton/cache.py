"""The cache's kernels: begin_chunk for all layers in one launch, write for one layer in one launch, and rotate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..arguments import CacheTensors
from ..geometry import CacheGeometry, WindowMask
from ..rope import RopeTables
from .launch import ALL_REGISTERS, FUSION, on_device, padded, rotary, rows
from .masks import evicted_frames
from .rotation import head_columns, narrow, phases, rotate_tile

_TOKENS = 32  # tokens of one head a program moves: 8 KB of a bfloat16 head of 128, 16-byte accesses at any head size
_WARPS = 4


def _warps(head_dim: int) -> int:
    """Of a program that fuses or writes: 4 for 256 columns hold more values than registers."""
    return _WARPS if head_dim <= 128 else 2 * _WARPS


# --- begin_chunk ------------------------------------------------------------------------------------------------------


@triton.jit
def _fold(sink, evicted, alpha, weight, DTYPE: tl.constexpr):
    """One step of the moving average in float32; a half DTYPE rounds both products and the sum, as published."""
    if DTYPE == tl.float32:
        folded = sink + weight * (evicted - sink)
    else:
        evicted = narrow(evicted, DTYPE).to(tl.float32)
        kept = narrow(alpha * sink, DTYPE).to(tl.float32)
        added = narrow(weight * evicted, DTYPE).to(tl.float32)
        folded = narrow(kept + added, DTYPE).to(tl.float32)
    return tl.where(weight != 0, folded, sink)


@triton.jit
def begin_chunk_kernel(
    K, V, SINK_K, SINK_V, NUM_FRAMES, ADVANCING, DECAY, TURNS, SPATIAL, new_frames, frame_tokens,
    batch, kv_heads, k_l, k_b, k_n, k_h, v_l, v_b, v_n, v_h, sk_l, sk_b, sk_n, sk_h, sv_l, sv_b, sv_n, sv_h,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, BEFORE_WINDOW: tl.constexpr, FOLDS: tl.constexpr,
    HAS_ADVANCING: tl.constexpr, HAS_SINK_K: tl.constexpr, HAS_SINK_V: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS tokens of one head, slot, sample and layer: it folds all that the slot receives, in order.

    It writes sink entries only and reads ring entries only, besides its own: no program reads what another writes.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(frame_tokens, TOKENS)
    token = (pid % blocks) * TOKENS + tl.arange(0, TOKENS)
    slot = pid // blocks % SINKS
    head = (pid // (blocks * SINKS) % kv_heads).to(tl.int64)
    sample = (pid // (blocks * SINKS * kv_heads) % batch).to(tl.int64)
    layer = (pid // (blocks * SINKS * kv_heads * batch)).to(tl.int64)

    before = tl.load(NUM_FRAMES + sample)
    grown = before + new_frames
    if HAS_ADVANCING:
        grown = tl.where(tl.load(ADVANCING + sample), grown, before)
    first = tl.maximum(before - (SINKS + WINDOW), 0)
    last = tl.maximum(grown - (SINKS + WINDOW), 0)
    # Frames S + first .. S + last - 1 leave; this slot receives the first one congruent to it, then every S-th.
    start = SINKS + first + (slot + SINKS - first % SINKS) % SINKS
    stop = SINKS + last
    count = tl.cdiv(tl.maximum(stop - start, 0), SINKS)

    moves = start < stop
    if BEFORE_WINDOW:
        moves = last > first
    if moves:
        column, exists = head_columns(D, BLOCK_D, HALF)
        mask = (token < frame_tokens)[:, None] & exists[None, :]
        own = (slot * frame_tokens + token).to(tl.int64)[:, None]
        k = K + layer * k_l + sample * k_b + head * k_h + column[None, :]
        v = V + layer * v_l + sample * v_b + head * v_h + column[None, :]
        alpha, weight = 1.0, 0.0
        if FOLDS:
            alpha = tl.load(DECAY + head)
            weight = tl.load(DECAY + kv_heads + head)
        if HAS_SINK_K or FOLDS:
            if HAS_SINK_K:
                sink = SINK_K + layer * sk_l + sample * sk_b + head * sk_h + column[None, :] + own * sk_n
            else:
                sink = k + own * k_n
            DTYPE: tl.constexpr = sink.dtype.element_ty
            sum_k = tl.load(sink, mask=mask, other=0.0).to(tl.float32)
            if FOLDS:
                for step in range(count):
                    frame = start + step * SINKS
                    ring = SINKS + (frame - SINKS) % WINDOW
                    at = (ring * frame_tokens + token).to(tl.int64)[:, None]
                    evicted = tl.load(k + at * k_n, mask=mask, other=0.0).to(tl.float32)
                    if ROPE:
                        cos, sin = phases(frame, token % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS)
                        evicted = rotate_tile(evicted, cos, -sin, HALF)
                    sum_k = _fold(sum_k, evicted, alpha, weight, DTYPE)
                if start < stop:
                    tl.store(sink, narrow(sum_k, DTYPE), mask=mask)
            if HAS_SINK_K:
                if ROPE:
                    position = slot
                    if BEFORE_WINDOW:
                        position = slot + last
                    cos, sin = phases(position, token % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS)
                    sum_k = rotate_tile(sum_k, cos, sin, HALF)
                tl.store(k + own * k_n, narrow(sum_k, K.dtype.element_ty), mask=mask)
        if FOLDS and start < stop:
            if HAS_SINK_V:
                sink_v = SINK_V + layer * sv_l + sample * sv_b + head * sv_h + column[None, :] + own * sv_n
            else:
                sink_v = v + own * v_n
            DTYPE_V: tl.constexpr = sink_v.dtype.element_ty
            sum_v = tl.load(sink_v, mask=mask, other=0.0).to(tl.float32)
            for step in range(count):
                frame = start + step * SINKS
                ring = SINKS + (frame - SINKS) % WINDOW
                at = (ring * frame_tokens + token).to(tl.int64)[:, None]
                evicted = tl.load(v + at * v_n, mask=mask, other=0.0).to(tl.float32)
                sum_v = _fold(sum_v, evicted, alpha, weight, DTYPE_V)
            tl.store(sink_v, narrow(sum_v, DTYPE_V), mask=mask)
            if HAS_SINK_V:
                tl.store(v + own * v_n, narrow(sum_v, V.dtype.element_ty), mask=mask)


def begin_chunk(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_frames: int,
    advancing: torch.Tensor | None,
    decay: torch.Tensor | None,
    rope: RopeTables | None,
    geometry: CacheGeometry,
    before_window: bool,
) -> None:
    k, v, sink_k, sink_v = cache
    layers, batch, _, kv_heads, head_dim = k.shape
    moves_sink = decay is not None or (sink_k is not None and rope is not None and before_window)
    if geometry.sink_frames == 0 or not moves_sink:
        return
    rotation = rotary(rope, k)
    # Left alone, ptxas fits three blocks on an SM: right, but sinks that saturate at every step and float32 keys spill.
    spills = k.dtype == torch.float32 or (sink_k is not None and sink_k.dtype == torch.float16)
    registers = ALL_REGISTERS if spills else {}
    blocks = triton.cdiv(geometry.frame_tokens, _TOKENS)
    with on_device(k):
        begin_chunk_kernel[(blocks * geometry.sink_frames * kv_heads * batch * layers,)](
            k, v, k if sink_k is None else sink_k, v if sink_v is None else sink_v, num_frames,
            num_frames if advancing is None else advancing, k if decay is None else decay, rotation.turns,
            rotation.spatial, new_frames, geometry.frame_tokens, batch, kv_heads, *k.stride()[:4], *v.stride()[:4],
            *(k if sink_k is None else sink_k).stride()[:4], *(v if sink_v is None else sink_v).stride()[:4],
            SINKS=geometry.sink_frames, WINDOW=geometry.window_frames, BEFORE_WINDOW=before_window and rope is not None,
            FOLDS=decay is not None, HAS_ADVANCING=advancing is not None, HAS_SINK_K=sink_k is not None,
            HAS_SINK_V=sink_v is not None, D=head_dim, BLOCK_D=padded(head_dim), TOKENS=_TOKENS, **rotation.options,
            num_warps=_warps(head_dim), **FUSION, **registers,
        )  # fmt: skip


# --- write ------------------------------------------------------------------------------------------------------------


@triton.jit
def write_kernel(
    K, V, SINK_K, SINK_V, NUM_FRAMES, NEW_K, NEW_V, TURNS, SPATIAL, frames, frame_tokens, kv_heads,
    k_b, k_n, k_h, v_b, v_n, v_h, sk_b, sk_n, sk_h, sv_b, sv_n, sv_h, nk_b, nk_n, nk_h, nv_b, nv_n, nv_h,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, HAS_SINK_K: tl.constexpr, HAS_SINK_V: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS tokens of one frame and head: one frame number, so one set of frame phases."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(frame_tokens, TOKENS)
    token = (pid % blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (pid // blocks % kv_heads).to(tl.int64)
    row = pid // (blocks * kv_heads) % frames
    sample = (pid // (blocks * kv_heads * frames)).to(tl.int64)
    frame = tl.load(NUM_FRAMES + sample) - frames + row
    if frame >= 0:
        column, exists = head_columns(D, BLOCK_D, HALF)
        mask = (token < frame_tokens)[:, None] & exists[None, :]
        ring = SINKS + tl.maximum(frame - SINKS, 0) % WINDOW
        slot = tl.where(frame < SINKS, frame, ring)
        source = (row * frame_tokens + token).to(tl.int64)[:, None]
        target = (slot * frame_tokens + token).to(tl.int64)[:, None]
        new_k = tl.load(NEW_K + sample * nk_b + head * nk_h + source * nk_n + column[None, :], mask=mask, other=0.0)
        new_v = tl.load(NEW_V + sample * nv_b + head * nv_h + source * nv_n + column[None, :], mask=mask, other=0.0)
        rotated = new_k
        if ROPE:
            cos, sin = phases(frame, token % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS)
            rotated = rotate_tile(new_k, cos, sin, HALF)
        k = K + sample * k_b + head * k_h + target * k_n + column[None, :]
        v = V + sample * v_b + head * v_h + target * v_n + column[None, :]
        tl.store(k, narrow(rotated, K.dtype.element_ty), mask=mask)
        tl.store(v, narrow(new_v, V.dtype.element_ty), mask=mask)
        if frame < SINKS:
            if HAS_SINK_K:
                sink_k = SINK_K + sample * sk_b + head * sk_h + target * sk_n + column[None, :]
                tl.store(sink_k, narrow(new_k, SINK_K.dtype.element_ty), mask=mask)
            if HAS_SINK_V:
                sink_v = SINK_V + sample * sv_b + head * sv_h + target * sv_n + column[None, :]
                tl.store(sink_v, narrow(new_v, SINK_V.dtype.element_ty), mask=mask)


def write(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
) -> None:
    k, v, sink_k, sink_v = cache
    new_k, new_v = rows(new_k), rows(new_v)
    batch, tokens, kv_heads, head_dim = new_k.shape
    frames = tokens // geometry.frame_tokens
    rotation = rotary(rope, k)
    tensors = (k, v, k if sink_k is None else sink_k, v if sink_v is None else sink_v)
    with on_device(k):
        write_kernel[(triton.cdiv(geometry.frame_tokens, _TOKENS) * kv_heads * frames * batch,)](
            *tensors, num_frames, new_k, new_v, rotation.turns, rotation.spatial, frames, geometry.frame_tokens,
            kv_heads, *(stride for x in (*tensors, new_k, new_v) for stride in x.stride()[:3]),
            SINKS=geometry.sink_frames, WINDOW=geometry.window_frames, HAS_SINK_K=sink_k is not None,
            HAS_SINK_V=sink_v is not None, D=head_dim, BLOCK_D=padded(head_dim), TOKENS=_TOKENS, **rotation.options,
            num_warps=_warps(head_dim), **FUSION,
        )  # fmt: skip


# --- rotate -----------------------------------------------------------------------------------------------------------


@triton.jit
def rotate_kernel(
    X, OUT, NUM_FRAMES, TURNS, SPATIAL, tokens, heads, offset, frame_tokens, x_b, x_n, x_h, sink_tokens, window_tokens,
    chunk_tokens, first_chunk_tokens,
    STREAM: tl.constexpr, MINUS_EVICTED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
    ROPE: tl.constexpr, HALF: tl.constexpr, FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """``OUT [B, tokens, heads, D]`` = X rotated; row r is token ``offset + r`` of its sequence.

    STREAM: the rows are the newest frames of a stream of NUM_FRAMES frames; else the sequence starts at frame 0.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(tokens, TOKENS)
    row = (pid % blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (pid // blocks % heads).to(tl.int64)
    sample = (pid // (blocks * heads)).to(tl.int64)
    column, exists = head_columns(D, BLOCK_D, HALF)
    mask = (row < tokens)[:, None] & exists[None, :]
    index = tl.minimum(row, tokens - 1) + offset
    x = tl.load(X + sample * x_b + head * x_h + row.to(tl.int64)[:, None] * x_n + column[None, :], mask=mask, other=0.0)
    if ROPE:
        frame = index // frame_tokens
        if STREAM:
            frame = frame + tl.load(NUM_FRAMES + sample) - tokens // frame_tokens
        if MINUS_EVICTED:
            frame = frame - evicted_frames(
                index, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens
            )
        cos, sin = phases(frame[:, None], index % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS)
        x = rotate_tile(x, cos, sin, HALF)
    out = OUT + ((sample * tokens + row.to(tl.int64)[:, None]) * heads + head) * D + column[None, :]
    tl.store(out, narrow(x, OUT.dtype.element_ty), mask=mask)


def rotate(
    x: torch.Tensor,
    rope: RopeTables | None,
    dtype: torch.dtype,
    *,
    num_frames: torch.Tensor | None = None,
    first_token: int = 0,
    mask: WindowMask | None = None,
) -> torch.Tensor:
    """``x [B, N, H, D]`` rotated, in dtype; x itself where there is nothing to do.

    num_frames: the rows are the newest frames of these streams. mask: queries as sinks outside their window meet them.
    """
    x = rows(x)
    if rope is None and x.dtype == dtype:
        return x
    batch, tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    rotation = rotary(rope, x)
    with on_device(x):
        rotate_kernel[(triton.cdiv(tokens, _TOKENS) * heads * batch,)](
            x, out, x if num_frames is None else num_frames, rotation.turns, rotation.spatial, tokens, heads,
            first_token, 1 if rope is None else rope.frame_tokens, *x.stride()[:3],
            *((0,) * 4 if mask is None else mask[:4]),
            STREAM=num_frames is not None, MINUS_EVICTED=mask is not None, D=head_dim, BLOCK_D=padded(head_dim),
            TOKENS=_TOKENS, **rotation.options, num_warps=2 * _WARPS, **FUSION,
        )  # fmt: skip
    return out
