"""Cache updates by torch's operations, for devices without kernels of ours: as few launches as they allow."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...contract.geometry import CacheGeometry
from ...contract.requests import BeginChunk, CacheTensors, Write, accumulate_dtype
from .. import reference
from .rotation import Turn, turn_of, turned
from .tables import ChunkTables, chunk_tables

_ELEMENTS_IN_FLIGHT = 1 << 24  # of the sinks of the layers that begin_chunk takes at once


# --- the beginning of a chunk -----------------------------------------------------------------------------------------


class _Leaving(NamedTuple):
    """Frames, one for each sink slot, in slot order: whether it leaves ``[B, S, 1, 1, 1]``, and where it lies."""

    leaves: torch.Tensor
    samples: torch.Tensor
    slots: torch.Tensor
    turn: Turn | None


class _Moved(NamedTuple):
    """Streams whose sinks change, bool ``[B, 1, 1, 1]``, and how the keys of these turn."""

    streams: torch.Tensor
    turn: Turn | None


def begin_chunk(request: BeginChunk) -> None:
    """As `reference.begin_chunk`, a few layers at a time. A layer is written when all of it has been computed, and the
    first ones need as much memory as any later ones: want of memory leaves the cache as it was."""
    cache, geometry, decay, rope = request.cache, request.geometry, request.decay, request.rope
    if geometry.sink_frames == 0:
        return
    before, grown = request.num_frames, request.num_frames + request.new_frames
    after = grown if request.advancing is None else torch.where(request.advancing, grown, before)
    first, last = geometry.evicted_frames(before), geometry.evicted_frames(after)
    tokens = geometry.sink_frames * geometry.frame_tokens
    groups = [] if decay is None else _groups(request, first, last)
    turn = None
    if rope is not None and cache.sink_k is not None:
        slots = torch.arange(geometry.sink_frames, device=after.device)
        positions = geometry.sink_position(slots, after[:, None], request.before_window).expand(len(after), -1)
        turn = turn_of(positions, rope, tokens)
    moved = _Moved((last > first)[:, None, None, None], turn)
    layers, batch, _, *heads = cache.k.shape
    step = max(1, _ELEMENTS_IN_FLIGHT // max(1, batch * tokens * heads[0] * heads[1]))
    for start in range(0, layers, step):
        k, v, *sinks = cache
        at = slice(start, start + step)
        part = CacheTensors(k[at], v[at], *(None if x is None else x[at] for x in sinks))
        for written, value in _fused(part, groups, moved, decay, geometry):
            written.copy_(value)


def _groups(request: BeginChunk, first: torch.Tensor, last: torch.Tensor) -> list[_Leaving]:
    """Evicted frames, oldest first, as many at once as there are sink slots: each then has a slot of its own."""
    geometry, rope, groups = request.geometry, request.rope, []
    sinks = torch.arange(geometry.sink_frames, device=first.device)
    samples = torch.arange(len(first), device=first.device)[:, None]
    for start in range(0, request.new_frames, geometry.sink_frames):
        oldest = first[:, None] + geometry.sink_frames + start
        frame = oldest + (sinks - oldest) % geometry.sink_frames  # which `fuse_slot` puts there
        turn = None
        if rope is not None:
            turn = turn_of(frame, rope, geometry.sink_frames * geometry.frame_tokens, inverse=True)
        leaves = (frame < geometry.sink_frames + last[:, None])[:, :, None, None, None]
        groups.append(_Leaving(leaves, samples, geometry.slot(frame), turn))
    return groups


def _fused(
    cache: CacheTensors, groups: list[_Leaving], moved: _Moved, decay: torch.Tensor | None, geometry: CacheGeometry
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What changes in these layers, and its new values."""
    changes, tokens = [], geometry.sink_frames * geometry.frame_tokens
    for cached, own, is_key in ((cache.k, cache.sink_k, True), (cache.v, cache.sink_v, False)):
        image = cached[:, :, :tokens]
        sums = image if own is None else own
        if decay is not None:
            averaged = _averaged(cached, sums, groups, decay, geometry, is_key)
            changes.append((sums, averaged))
            sums = averaged
        if own is not None:
            fresh = turned(sums, moved.turn if is_key else None, cached.dtype)
            changes.append((image, torch.where(moved.streams, fresh, image)))
    return changes


def _averaged(
    cached: torch.Tensor,
    sums: torch.Tensor,
    groups: list[_Leaving],
    decay: torch.Tensor,
    geometry: CacheGeometry,
    is_key: bool,
) -> torch.Tensor:
    """``sums [L, B, S * T, H, D]`` once the frames of the groups have been fused into them."""
    by_frame = cached.unflatten(2, (-1, geometry.frame_tokens))
    by_slot = sums.unflatten(2, (-1, geometry.frame_tokens))
    for group in groups:
        evicted = by_frame[:, group.samples, group.slots]
        if is_key:
            evicted = turned(evicted.flatten(2, 3), group.turn, accumulate_dtype(cached.dtype)).view_as(evicted)
        by_slot = torch.where(group.leaves, reference.fold(by_slot, evicted, decay), by_slot)
    return by_slot.flatten(2, 3)


# --- a pass -----------------------------------------------------------------------------------------------------------


def write(request: Write) -> None:
    """As `reference.write`."""
    tables = _tables(request)
    _store(request, tables, turned(request.new_k, tables.turn, request.cache.k.dtype), ring_only=False)


def write_and_turn(request: Write, q: torch.Tensor, ring_only: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes; returns the pass's queries ``[B, F * T, H_q, D]`` rotated with its keys, and the frames ``[B, F]``.

    ring_only: every stream has all open frames, and none of them is in a sink slot.
    """
    tables, dtype, k = _tables(request), request.cache.k.dtype, request.new_k
    if tables.turn is None:
        q, k = reference.store(q, dtype), reference.store(k, dtype)
    else:
        q, k = turned(torch.cat([q, k], 2), tables.turn, dtype).split([q.shape[2], k.shape[2]], 2)
    _store(request, tables, k, ring_only)
    return q, tables.frames


def _tables(request: Write) -> ChunkTables:
    count = request.new_k.shape[1] // request.geometry.frame_tokens
    return chunk_tables(request.num_frames, count, request.rope, request.geometry)


def _store(request: Write, tables: ChunkTables, rotated: torch.Tensor, ring_only: bool) -> None:
    cache, geometry, at = request.cache, request.geometry, (tables.samples, tables.slots)
    for cached, new in ((cache.k, rotated), (cache.v, reference.store(request.new_v, cache.v.dtype))):
        by_frame = cached.unflatten(1, (-1, geometry.frame_tokens))
        new = new.unflatten(1, (-1, geometry.frame_tokens))
        if not ring_only:  # a missing frame writes back what its slot holds
            new = torch.where((tables.frames >= 0)[:, :, None, None, None], new, by_frame[at])
        by_frame[at] = new
    if not ring_only:
        _store_sinks(request, tables)


def _store_sinks(request: Write, tables: ChunkTables) -> None:
    """An open frame g < S replaces its accumulator too."""
    geometry, frames, count = request.geometry, tables.frames, tables.frames.shape[1]
    pairs = ((request.cache.sink_k, request.new_k), (request.cache.sink_v, request.new_v))
    if geometry.sink_frames == 0 or all(own is None for own, _ in pairs):
        return
    source = torch.arange(geometry.sink_frames, device=frames.device) - frames[:, :1]  # chunk frame of a sink slot
    opened, source = ((source >= 0) & (source < count))[:, :, None, None, None], source.clamp(0, count - 1)
    for own, new in pairs:
        if own is not None:
            by_slot = own.unflatten(1, (-1, geometry.frame_tokens))
            new = reference.store(new, own.dtype).unflatten(1, (-1, geometry.frame_tokens))
            by_slot.copy_(torch.where(opened, new[tables.samples, source], by_slot))
