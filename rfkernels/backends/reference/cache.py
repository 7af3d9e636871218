"""The cache: fusion of evicted frames into the sink, and writing of a chunk."""

from __future__ import annotations

import torch

from ...contract.geometry import CacheGeometry
from ...contract.requests import BeginChunk, CacheTensors, RopeTables, Write, accumulate_dtype, open_frames
from .rotation import rotate, store


def begin_chunk(request: BeginChunk) -> None:
    """Fuses what leaves the window, oldest first, ``sink += w * (evicted - sink)``, and re-rotates the sink."""
    cache, geometry, decay = request.cache, request.geometry, request.decay
    if geometry.sink_frames == 0:
        return
    before, grown = request.num_frames, request.num_frames + request.new_frames
    after = grown if request.advancing is None else torch.where(request.advancing, grown, before)
    first, last = geometry.evicted_frames(before), geometry.evicted_frames(after)
    if decay is not None:
        for step in range(request.new_frames):
            evicted = first + step
            _fuse(cache, geometry.sink_frames + evicted, evicted < last, decay, request.rope, geometry)
    moved = (last > first)[:, None, None, None]
    tokens = geometry.sink_frames * geometry.frame_tokens
    image_k, image_v = cache.k[:, :, :tokens], cache.v[:, :, :tokens]
    if cache.sink_k is not None:
        slots = torch.arange(geometry.sink_frames, device=after.device)
        positions = geometry.sink_position(slots, after[:, None], request.before_window).expand(len(after), -1)
        image_k.copy_(torch.where(moved, rotate(cache.sink_k, positions, request.rope, dtype=cache.k.dtype), image_k))
    if cache.sink_v is not None:
        image_v.copy_(torch.where(moved, store(cache.sink_v, cache.v.dtype), image_v))


def _fuse(
    cache: CacheTensors,
    frame: torch.Tensor,
    leaves: torch.Tensor,
    decay: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
) -> None:
    """Fuses frame ``frame[b]`` of every sample into its sink slot where ``leaves[b]``."""
    samples = torch.arange(len(frame), device=frame.device)
    leaves = leaves[:, None, None, None]

    def frames_of(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, geometry.frame_tokens))  # a view [L, B, frames, T, H, D]

    evicted_k = frames_of(cache.k)[:, samples, geometry.slot(frame)]
    evicted_v = frames_of(cache.v)[:, samples, geometry.slot(frame)]
    evicted_k = rotate(evicted_k, frame[:, None], rope, inverse=True, dtype=accumulate_dtype(cache.k.dtype))
    for cached, own, evicted in ((cache.k, cache.sink_k, evicted_k), (cache.v, cache.sink_v, evicted_v)):
        sums = frames_of(cached if own is None else own)
        old = sums[:, samples, geometry.fuse_slot(frame)]
        sums[:, samples, geometry.fuse_slot(frame)] = torch.where(leaves, fold(old, evicted, decay), old)


def fold(sink: torch.Tensor, evicted: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """One step of the moving average; ``sink``'s dtype decides how it is rounded.

    float32 and float64: ``sink + w * (evicted - sink)``, which leaves a constant where it is. A half dtype reproduces
    the published arithmetic: both products and the sum rounded.
    """
    alpha, weight = decay[:, :, None]  # [H_kv, 1], broadcast over [..., H_kv, D]
    half = sink.dtype.itemsize == 2
    if half:
        evicted = store(evicted, sink.dtype)
    wide, evicted = sink.to(decay.dtype), evicted.to(decay.dtype)
    if half:
        kept, added = store(alpha * wide, sink.dtype), store(weight * evicted, sink.dtype)
        folded = store(kept.to(decay.dtype) + added.to(decay.dtype), sink.dtype)
    else:
        folded = wide + weight * (evicted - wide)
    return torch.where(weight != 0, folded, sink)


def write(request: Write) -> None:
    """Writes into the open frames, replacing what they hold; a frame g < S replaces its sink slot too."""
    cache, geometry, new_k, new_v = request.cache, request.geometry, request.new_k, request.new_v
    count = new_k.shape[1] // geometry.frame_tokens
    frames = open_frames(request.num_frames, count)
    present = frames >= 0
    # A missing frame writes back what its slot holds. A stream that lacks some has frames 0 .. N - 1, in slots of the
    # same number: N .. F - 1 are free.
    slots = torch.where(present, geometry.slot(frames), frames + count)
    samples = torch.arange(len(frames), device=frames.device)[:, None]
    rotated = rotate(new_k, frames, request.rope, dtype=cache.k.dtype)
    for cached, new in ((cache.k, rotated), (cache.v, store(new_v, cache.v.dtype))):
        by_frame = cached.unflatten(1, (-1, geometry.frame_tokens))
        new = new.unflatten(1, (-1, geometry.frame_tokens))
        by_frame[samples, slots] = torch.where(present[:, :, None, None, None], new, by_frame[samples, slots])

    source = torch.arange(geometry.sink_frames, device=frames.device) - frames[:, :1]  # chunk frame of a sink slot
    open_slot = ((source >= 0) & (source < count))[:, :, None, None, None]
    for own, new in ((cache.sink_k, new_k), (cache.sink_v, new_v)):
        if own is not None and geometry.sink_frames > 0:
            by_frame = own.unflatten(1, (-1, geometry.frame_tokens))
            new = store(new, own.dtype).unflatten(1, (-1, geometry.frame_tokens))
            by_frame.copy_(torch.where(open_slot, new[samples, source.clamp(0, count - 1)], by_frame))
