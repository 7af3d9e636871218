"""The frozen past of an open chunk, for attention that must not write (training)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .contract.geometry import CacheGeometry
from .contract.requests import Past, RopeTables


@dataclass(frozen=True, eq=False)
class Context:
    """The frozen past of an open chunk in one layer, for `chunk_attention`. Safe to keep: the cache never changes it.

    It holds one copy of the layer's past, made when it was asked for, which every pass over the chunk shares.
    """

    past: Past
    geometry: CacheGeometry
    rope: RopeTables | None
    frames: int

    @property
    def device(self) -> torch.device:
        """Where its tensors are: the cache's device."""
        return self.past.k.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its keys and values: the cache's dtype."""
        return self.past.k.dtype

    @property
    def batch_size(self) -> int:
        """B, the streams of the cache."""
        return self.past.k.shape[0]

    @property
    def num_kv_heads(self) -> int:
        """H_kv."""
        return self.past.k.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.past.k.shape[3]


def freeze(
    k: torch.Tensor,
    v: torch.Tensor,
    num_frames: torch.Tensor,
    full: bool,
    geometry: CacheGeometry,
    rope: RopeTables | None,
    frames: int,
) -> Context:
    """The past of an open chunk of ``frames`` frames in one layer's k and v ``[B, (S + W) * T, H_kv, D]``, copied.

    num_frames: int64 [B] on the device, not changed later. full: no stream lacks a frame of its past.
    """
    with torch.no_grad():
        slots, present = _past_slots(num_frames, geometry, frames)
        past_k, past_v = (_gather(x, slots, present, geometry, full) for x in (k, v))
    past = Past(past_k, past_v, num_frames, full)
    return Context(past, geometry, rope, frames)


def _past_slots(num_frames: torch.Tensor, geometry: CacheGeometry, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots ``[B, P]`` of the frames before the open chunk, sinks first, and which of them exist. Reads no value."""
    index = torch.arange(geometry.capacity - frames, device=num_frames.device)
    oldest = (num_frames - geometry.window_frames).clamp(min=geometry.sink_frames)[:, None]  # in the window
    frame = torch.where(index < geometry.sink_frames, index, oldest + index - geometry.sink_frames)
    return geometry.slot(frame), frame < (num_frames - frames)[:, None]


def _gather(
    x: torch.Tensor, slots: torch.Tensor, present: torch.Tensor, geometry: CacheGeometry, full: bool
) -> torch.Tensor:
    by_frame = x.unflatten(1, (-1, geometry.frame_tokens))
    samples = torch.arange(len(x), device=x.device)[:, None]
    found = by_frame[samples, slots]
    if not full:  # what no frame has reached may hold anything
        found = torch.where(present[:, :, None, None, None], found, 0)
    return found.flatten(1, 2)
