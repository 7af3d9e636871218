"""begin_chunk for all layers in one launch, write for one layer: docs/semantics.md, "Rotate once, when written"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...contract.requests import BeginChunk, CacheTensors, Write
from ..plan import divide_up
from .launch import ALL_REGISTERS, FUSION, addressable, key_values, on_device, padded, rope_of, strided
from .rotation import phases, rotate_tile
from .structs import Cache
from .tiling import head_of, narrow, pair_columns

_TOKENS = 32  # tokens of one head a program moves: 8 KB of a bfloat16 head of 128, 16-byte accesses at any head size


def _warps(head_dim: int) -> int:
    """4 for 256 columns hold more values than registers."""
    return 4 if head_dim <= 128 else 8


def _cache_of(cache: CacheTensors) -> Cache:
    k, v, sink_k, sink_v = cache
    return Cache(
        strided(k), strided(v), None if sink_k is None else strided(sink_k), None if sink_v is None else strided(sink_v)
    )


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


class _Place(NamedTuple):
    """A program's tokens of one sink slot: ``token`` in their frame, ``at`` in the sinks, and the head's columns."""

    slot: Any
    token: Any
    at: Any
    columns: Any
    exist: Any


class _Leaving(NamedTuple):
    """Frames that leave the window for one sink slot: from start to stop every SINKS-th, ``count`` of them.

    evicted: frames that have left the window, for any slot, these included.
    """

    start: Any
    stop: Any
    count: Any
    evicted: Any


@triton.jit
def _leaving(slot, before, after, SINKS: tl.constexpr):
    """Frames SINKS + before .. SINKS + after - 1 leave; a slot gets the first one congruent to it, and so on."""
    start = SINKS + before + (slot + SINKS - before % SINKS) % SINKS
    stop = SINKS + after
    return _Leaving(start, stop, tl.cdiv(tl.maximum(stop - start, 0), SINKS), after)


@triton.jit
def _layer_head(x, layer, sample, head, place):
    """Pointers to the columns of a head's first token."""
    return x.data + layer * x.layer + sample * x.sample + head * x.head + place.columns[None, :]


@triton.jit
def _fold_leaving(
    total, held, step, leaving, alpha, weight, place, frame_tokens, rope,
    DTYPE: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The average ``total``, kept in DTYPE, with the leaving frames folded in; a rope un-rotates them first."""
    for number in range(leaving.count):
        frame = leaving.start + number * SINKS
        slot = SINKS + (frame - SINKS) % WINDOW
        at = (slot * frame_tokens + place.token).to(tl.int64)[:, None]
        evicted = tl.load(held + at * step, mask=place.exist, other=0.0).to(tl.float32)
        if rope is not None:
            cos, sin = phases(frame, place.token % frame_tokens, rope, D, BLOCK_D)
            evicted = rotate_tile(evicted, cos, -sin, rope)
        total = _fold(total, evicted, alpha, weight, DTYPE)
    return total


@triton.jit
def _begin_keys(
    cache, layer, sample, head, place, leaving, alpha, weight, frame_tokens, rope,
    FOLDS: tl.constexpr, BEFORE_WINDOW: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Averages a sink's un-rotated keys, and rotates their image in the cache at the sink's new position."""
    k = _layer_head(cache.k, layer, sample, head, place)
    if cache.sink_k is not None:
        sink = _layer_head(cache.sink_k, layer, sample, head, place) + place.at * cache.sink_k.token
    else:
        sink = k + place.at * cache.k.token
    DTYPE: tl.constexpr = sink.dtype.element_ty
    total = tl.load(sink, mask=place.exist, other=0.0).to(tl.float32)
    if FOLDS:
        total = _fold_leaving(
            total, k, cache.k.token, leaving, alpha, weight, place, frame_tokens, rope, DTYPE, SINKS, WINDOW, D, BLOCK_D
        )
        if leaving.start < leaving.stop:
            tl.store(sink, narrow(total, DTYPE), mask=place.exist)
    if cache.sink_k is not None:
        if rope is not None:
            position = place.slot
            if BEFORE_WINDOW:
                position = place.slot + leaving.evicted
            cos, sin = phases(position, place.token % frame_tokens, rope, D, BLOCK_D)
            total = rotate_tile(total, cos, sin, rope)
        tl.store(k + place.at * cache.k.token, narrow(total, cache.k.data.dtype.element_ty), mask=place.exist)


@triton.jit
def _begin_values(
    cache, layer, sample, head, place, leaving, alpha, weight, frame_tokens,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Averages a sink's values."""
    v = _layer_head(cache.v, layer, sample, head, place)
    if cache.sink_v is not None:
        sink = _layer_head(cache.sink_v, layer, sample, head, place) + place.at * cache.sink_v.token
    else:
        sink = v + place.at * cache.v.token
    DTYPE: tl.constexpr = sink.dtype.element_ty
    total = tl.load(sink, mask=place.exist, other=0.0).to(tl.float32)
    total = _fold_leaving(
        total, v, cache.v.token, leaving, alpha, weight, place, frame_tokens, None, DTYPE, SINKS, WINDOW, D, BLOCK_D
    )
    tl.store(sink, narrow(total, DTYPE), mask=place.exist)
    if cache.sink_v is not None:
        tl.store(v + place.at * cache.v.token, narrow(total, cache.v.data.dtype.element_ty), mask=place.exist)


@triton.jit
def begin_chunk_kernel(
    cache, num_frames, advancing, decay, rope, new_frames, frame_tokens, batch, kv_heads,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, BEFORE_WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
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

    before = tl.load(num_frames + sample)
    grown = before + new_frames
    if advancing is not None:
        grown = tl.where(tl.load(advancing + sample), grown, before)
    evicted_before = tl.maximum(before - (SINKS + WINDOW), 0)
    evicted = tl.maximum(grown - (SINKS + WINDOW), 0)
    leaving = _leaving(slot, evicted_before, evicted, SINKS)
    receives = leaving.start < leaving.stop
    moves = receives
    if BEFORE_WINDOW:
        moves = evicted > evicted_before
    if moves:
        FOLDS: tl.constexpr = decay is not None
        columns = pair_columns(rope, D, BLOCK_D)
        exist = (token < frame_tokens)[:, None] & columns.exist[None, :]
        at = (slot * frame_tokens + token).to(tl.int64)[:, None]
        place = _Place(slot, token, at, columns.at, exist)
        alpha, weight = 1.0, 0.0
        if FOLDS:
            alpha = tl.load(decay + head)
            weight = tl.load(decay + kv_heads + head)
        if FOLDS or cache.sink_k is not None:
            _begin_keys(
                cache, layer, sample, head, place, leaving, alpha, weight, frame_tokens, rope, FOLDS, BEFORE_WINDOW,
                SINKS, WINDOW, D, BLOCK_D,
            )  # fmt: skip
        if FOLDS and receives:
            _begin_values(
                cache, layer, sample, head, place, leaving, alpha, weight, frame_tokens, SINKS, WINDOW, D, BLOCK_D
            )


def begin_chunk(request: BeginChunk) -> None:
    k, geometry, rope = request.cache.k, request.geometry, request.rope
    sink_k = request.cache.sink_k
    layers, batch, _, kv_heads, head_dim = k.shape
    before_window = request.before_window and rope is not None
    moves_sink = request.decay is not None or (sink_k is not None and before_window)
    if geometry.sink_frames == 0 or not moves_sink:
        return
    # Left alone, ptxas fits three blocks on an SM: right, but sinks that saturate at every step and float32 keys spill.
    spills = k.dtype == torch.float32 or (sink_k is not None and sink_k.dtype == torch.float16)
    registers = ALL_REGISTERS if spills else {}
    blocks = divide_up(geometry.frame_tokens, _TOKENS)
    with on_device(k):
        begin_chunk_kernel[(blocks * geometry.sink_frames * kv_heads * batch * layers,)](
            _cache_of(request.cache), request.num_frames, request.advancing, request.decay, rope_of(rope),
            request.new_frames, geometry.frame_tokens, batch, kv_heads, SINKS=geometry.sink_frames,
            WINDOW=geometry.window_frames, BEFORE_WINDOW=before_window, D=head_dim, BLOCK_D=padded(head_dim),
            TOKENS=_TOKENS, num_warps=_warps(head_dim), **FUSION, **registers,
        )  # fmt: skip


# --- write ------------------------------------------------------------------------------------------------------------


@triton.jit
def _pointers(x, sample, head, at, columns):
    """To the tokens ``at`` of a head."""
    return head_of(x, sample, head) + at * x.token + columns.at[None, :]


@triton.jit
def _store(pointers, values, exist):
    tl.store(pointers, narrow(values, pointers.dtype.element_ty), mask=exist)


@triton.jit
def write_kernel(
    cache, num_frames, new, rope, frames, frame_tokens, kv_heads,
    SINKS: tl.constexpr, WINDOW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """A program owns TOKENS tokens of one frame and head: one frame number, so one set of frame phases."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(frame_tokens, TOKENS)
    token = (pid % blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (pid // blocks % kv_heads).to(tl.int64)
    number = pid // (blocks * kv_heads) % frames
    sample = (pid // (blocks * kv_heads * frames)).to(tl.int64)
    frame = tl.load(num_frames + sample) - frames + number
    if frame >= 0:
        columns = pair_columns(rope, D, BLOCK_D)
        exist = (token < frame_tokens)[:, None] & columns.exist[None, :]
        ring = SINKS + tl.maximum(frame - SINKS, 0) % WINDOW
        slot = tl.where(frame < SINKS, frame, ring)
        source = (number * frame_tokens + token).to(tl.int64)[:, None]
        target = (slot * frame_tokens + token).to(tl.int64)[:, None]
        new_k = tl.load(_pointers(new.k, sample, head, source, columns), mask=exist, other=0.0)
        new_v = tl.load(_pointers(new.v, sample, head, source, columns), mask=exist, other=0.0)
        rotated = new_k
        if rope is not None:
            cos, sin = phases(frame, token % frame_tokens, rope, D, BLOCK_D)
            rotated = rotate_tile(new_k, cos, sin, rope)
        k = _pointers(cache.k, sample, head, target, columns)
        v = _pointers(cache.v, sample, head, target, columns)
        _store(k, rotated, exist)
        _store(v, new_v, exist)
        if frame < SINKS:
            if cache.sink_k is not None:
                _store(_pointers(cache.sink_k, sample, head, target, columns), new_k, exist)
            if cache.sink_v is not None:
                _store(_pointers(cache.sink_v, sample, head, target, columns), new_v, exist)


def write(request: Write) -> None:
    geometry, k = request.geometry, request.cache.k
    new_k, new_v = addressable(request.new_k), addressable(request.new_v)
    batch, tokens, kv_heads, head_dim = new_k.shape
    frames = tokens // geometry.frame_tokens
    with on_device(k):
        write_kernel[(-(-geometry.frame_tokens // _TOKENS) * kv_heads * frames * batch,)](
            _cache_of(request.cache), request.num_frames, key_values(new_k, new_v), rope_of(request.rope), frames,
            geometry.frame_tokens, kv_heads, SINKS=geometry.sink_frames, WINDOW=geometry.window_frames, D=head_dim,
            BLOCK_D=padded(head_dim), TOKENS=_TOKENS, num_warps=_warps(head_dim), **FUSION,
        )  # fmt: skip
