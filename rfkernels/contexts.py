"""The frozen past of an open chunk, for attention that must not write (training)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .arguments import Past
from .geometry import CacheGeometry
from .rope import RopeTables

if TYPE_CHECKING:
    from .cache import EMASinkCache

Frame = tuple[torch.Tensor, torch.Tensor]  # rotated keys and values, [T, H_kv, D] each


@dataclass(frozen=True, eq=False)
class Context:
    """The frozen past of an open chunk in one layer, for `chunk_attention`. Safe to keep: the cache never changes it.

    Frames of the past are shared between the contexts of consecutive chunks; the sink image is its own.
    """

    past: Past
    geometry: CacheGeometry
    rope: RopeTables | None
    frames: int
    kv_heads: int
    head_dim: int

    @property
    def device(self) -> torch.device:
        return self.past.num_frames.device


class Contexts:
    """The contexts of a cache's open chunk, and the copies of frames that they share.

    A frame of the past is copied once, when the first context needs it, and dropped here when it leaves the window or
    is opened again; contexts keep what they need. Inference, which asks for no context, copies nothing.
    """

    def __init__(self, cache: EMASinkCache):
        self._cache = cache
        self.forget()

    def forget(self) -> None:
        self._frames: dict[tuple[int, int], dict[int, Frame]] = {}  # by (layer, sample), then frame number
        self._open: dict[int, Context] = {}  # by layer
        self._num_frames: torch.Tensor | None = None

    def next_chunk(self) -> None:
        """A chunk has been opened: keeps copies of the frames that are its past, which nothing can change now."""
        self._open, self._num_frames = {}, None
        for (_, sample), frames in self._frames.items():
            past = self._window_frames(sample)
            for frame in [frame for frame in frames if frame not in past]:
                del frames[frame]

    def of(self, layer: int) -> Context:
        if layer not in self._open:
            with torch.no_grad():
                self._open[layer] = self._freeze(layer)
        return self._open[layer]

    def _freeze(self, layer: int) -> Context:
        cache = self._cache
        past_k: list[torch.Tensor] = []
        past_v: list[torch.Tensor] = []
        sinks, filler = self._sink_frames(layer), None
        for sample in range(cache.batch_size):
            frames = sinks[sample] + [self._frame(layer, sample, frame) for frame in self._window_frames(sample)]
            missing = cache.geometry.capacity - cache.open_frames - len(frames)
            if missing and filler is None:
                filler = cache.k.new_zeros(cache.geometry.frame_tokens, cache.num_kv_heads, cache.head_dim)
            frames += [(filler, filler)] * missing
            past_k += [k for k, _ in frames]
            past_v += [v for _, v in frames]
        if self._num_frames is None:
            self._num_frames = cache.num_frames.clone()
        past = Past(past_k, past_v, self._num_frames, cache.full, cache.dtype)
        return Context(past, cache.geometry, cache.rope_tables, cache.open_frames, cache.num_kv_heads, cache.head_dim)

    def _sink_frames(self, layer: int) -> list[list[Frame]]:
        """The filled sink slots of every sample that are not open, views of one copy of the sinks."""
        cache, tokens = self._cache, self._cache.geometry.frame_tokens
        counts = [max(0, min(cache.geometry.sink_frames, age - cache.open_frames)) for age in cache.ages]
        if max(counts) == 0:
            return [[] for _ in counts]
        k, v = (x[layer, :, : max(counts) * tokens].clone().unflatten(1, (-1, tokens)) for x in (cache.k, cache.v))
        return [[(k[b, slot], v[b, slot]) for slot in range(count)] for b, count in enumerate(counts)]

    def _window_frames(self, sample: int) -> range:
        """The window frames of a stream before its open chunk."""
        cache = self._cache
        first = max(cache.geometry.sink_frames, cache.ages[sample] - cache.geometry.window_frames)
        return range(first, max(first, cache.ages[sample] - cache.open_frames))

    def _frame(self, layer: int, sample: int, frame: int) -> Frame:
        cache, frames = self._cache, self._frames.setdefault((layer, sample), {})
        if frame not in frames:
            start = cache.geometry.slot(frame) * cache.geometry.frame_tokens
            tokens = slice(start, start + cache.geometry.frame_tokens)
            frames[frame] = (cache.k[layer, sample, tokens].clone(), cache.v[layer, sample, tokens].clone())
        return frames[frame]
