"""The cache of one video of a patched model: its size from theirs, its clock from their ``current_start``."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from ..attention import chunk_attention, dense_attention, streaming_attention
from ..backends.reference.rotation import rotate
from ..cache import EMASinkCache
from ..contexts import Context

KVCache = Sequence[dict[str, Any]]


class Family(NamedTuple):
    """What the self-attention of one repository does with its cache."""

    name: str
    alpha: float
    sink_positions: str
    larger_positions: str | None  # where its cache is larger than its window; None: it does not read the sink then
    protects_sink: bool = False  # from a recache, unless ``sink_recache_after_switch``
    returns_update: bool = False


class Window(NamedTuple):
    """S, W and what happens to the sink; ``held``: frames that their cache holds; ``limit``: frames of a video."""

    sink: int
    frames: int
    alpha: Any
    sink_positions: str
    held: int
    limit: int | None


def window_of(
    family: Family, sink: int, cache_tokens: int, seen_tokens: int, evicts: bool, frame_tokens: int, alpha: Any
) -> Window:
    """The window that their code attends to.

    Args:
        cache_tokens: of their cache; seen_tokens: their ``max_attention_size``. The smaller one is S + W.
        evicts: ``local_attn_size`` is not -1.
        alpha: as given to `patch`. One that is given holds wherever a frame leaves the window, without limit.

    Raises:
        ValueError: sizes that are not whole frames, or no room beside the sink.
    """
    held, larger = cache_tokens // frame_tokens, cache_tokens > seen_tokens
    seen = seen_tokens // frame_tokens if larger else held
    name, tokens = ("max_attention_size", seen_tokens) if larger else ("kv_cache[0]['k']", cache_tokens)
    if tokens % frame_tokens and (larger or evicts):
        raise ValueError(f"{name} must be whole frames of {frame_tokens} tokens, got {tokens} tokens")
    limit, rule, positions = None if evicts else held, family.alpha, family.sink_positions
    if larger:  # frames leave the window long before they leave the cache: nothing is averaged
        rule = 1.0
        if family.larger_positions is None:
            limit = None if evicts and held - sink >= seen else held
            sink = 0
        elif sink:
            limit = held if positions == "before_window" else limit
            positions = family.larger_positions
    if alpha is not None:
        rule, limit = alpha, None
    if seen <= sink:
        raise ValueError(f"the window must exceed sink_size={sink} frames, got {seen} frames of {frame_tokens} tokens")
    return Window(sink, seen - sink, rule, positions, held, limit)


class PassLayer:
    """What a self-attention is given in place of its dict, for one pass."""

    def __init__(self, cache: EMASinkCache, index: int, front: int):
        self.cache, self.index, self.front = cache, index, front
        self.past: Context | None = None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``streaming_attention`` of q, k and v ``[B, F * T, H, D]``, un-rotated.

        A pass that activation checkpointing runs again sees the past that it saw before, and does not write.
        """
        if self.front:
            return self._attend_from_behind(q, k, v)
        layer = self.cache[self.index]
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            return streaming_attention(q, k, v, layer)
        if self.past is not None:
            return chunk_attention(q, k, v, self.past)
        self.past = layer.context()
        out = chunk_attention(q, k, v, self.past)
        layer.write(k, v)
        return out

    def _attend_from_behind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """A recache of more frames than the window keeps: the first ``front`` attend, and are not written."""
        cache, layer = self.cache, self.cache[self.index]
        behind = self.front * cache.frame_tokens
        kept = streaming_attention(q[:, behind:], k[:, behind:], v[:, behind:], layer)
        first = cache.ages[0] - cache.open_frames - self.front
        frames = torch.arange(first, first + self.front, device=q.device)[None]
        valid = min(cache.ages[0], cache.sink_frames + cache.window_frames) * cache.frame_tokens
        rotated = rotate(q[:, :behind], frames, cache._rope_tables, dtype=cache.dtype)
        out = dense_attention(rotated, layer.k[:, :valid], layer.v[:, :valid])
        return torch.cat([out.to(kept.dtype), kept], 1)


class Stream:
    """One video: a list of their dicts, whose tensors become views of ``cache``.

    Frames are counted as they count them; ``origin`` is the frame that ``cache`` has as its frame 0.
    """

    def __init__(
        self, family: Family, window: Window, made_for: tuple[int, int, int], kv_cache: KVCache, options: dict
    ):
        self.family, self.window, self.made_for = family, window, made_for
        self.origin = self.end = self.frames = self.front = 0
        self.rewrites_sink = False  # of the last call
        self._index, self._version = _mark(kv_cache)
        self._theirs = [weakref.ref(layer[name]) for name in ("k", "v") for layer in kv_cache]
        k = kv_cache[0]["k"]
        self._shape, self._like = k.shape, k.new_empty(0)
        batch, _, heads, head_dim = k.shape
        self._point([self._like] * len(self._theirs))  # their memory is free before ours is taken
        try:
            self.cache = EMASinkCache(
                num_layers=len(kv_cache), batch_size=batch, num_kv_heads=heads, head_dim=head_dim,
                frame_tokens=made_for[0] * made_for[1], sink_frames=window.sink, window_frames=window.frames,
                alpha=window.alpha, sink_positions=window.sink_positions, dtype=k.dtype, device=k.device, **options,
            )  # fmt: skip
        except BaseException:
            self.give_back()
            raise
        self._point([*self.cache.k, *self.cache.v])
        self._warned = False

    def _point(self, to: Sequence[torch.Tensor]) -> None:
        for theirs, x in zip(self._theirs, to, strict=True):
            tensor = theirs()
            if tensor is not None:
                tensor.data = x

    def give_back(self) -> None:
        """Leaves their tensors as a new, empty cache of theirs."""
        for theirs in self._theirs:
            tensor = theirs()
            if tensor is not None:
                tensor.data = self._like.new_zeros(self._shape)

    def layers(self) -> list[PassLayer]:
        return [PassLayer(self.cache, index, self.front) for index in range(len(self.cache))]

    # --- the clock ----------------------------------------------------------------------------------------------------

    def open(self, start: int, frames: int, rewrites_sink: bool, kv_cache: KVCache) -> None:
        """Opens frames start .. start + frames - 1, unless they are open: the next pass of the same chunk.

        A call that starts at frame 0 begins a video. One that ends where the last ended, with other frames, is a
        recache; with ``rewrites_sink`` even of a sink that its family protects from one.

        Raises:
            ValueError: frames that this cache cannot hold as their code would. Nothing has changed then.
        """
        index, version = _mark(kv_cache)
        reset = index() is not self._index() or version != self._version
        end = start + frames
        if start == 0:
            if (self.origin, self.end, self.frames) != (0, frames, frames):
                self._restart(0, frames)
            self._index, self._version, self.rewrites_sink = index, version, rewrites_sink
            return
        if reset:
            raise ValueError(f"current_start must be 0 once the cache's indices are reset, got frame {start}")
        if not self.origin <= start <= self.end or end < self.end:
            raise ValueError(
                f"current_start must be at most frame {self.end}, where the video ends, and reach to it, got "
                f"{frames} frames at {start}: frames cannot be left out or taken back"
            )
        if end > self.end:
            self._advance(start, frames)
        elif frames != self.frames or rewrites_sink != self.rewrites_sink:
            self._recache(start, frames, rewrites_sink)
        self.rewrites_sink = rewrites_sink

    def _done(self, origin: int, end: int, frames: int, front: int = 0) -> None:
        self.origin, self.end, self.frames, self.front = origin, end, frames, front

    def _restart(self, origin: int, frames: int) -> None:
        capacity = self.window.sink + self.window.frames
        if frames > capacity:
            raise ValueError(f"a first chunk, or a recache of the sink, must have 1..{capacity} frames, got {frames}")
        self.cache.reset()
        self.cache.begin_chunk(frames)
        self._done(origin, origin + frames, frames)

    def _advance(self, start: int, frames: int) -> None:
        end, limit = start + frames, self.window.limit
        if limit is not None and end - self.origin > limit:
            raise ValueError(
                f"the video must have at most {limit} frames, which its cache holds, got {end - self.origin}: "
                f"{self.family.name} does not evict here in a way that can be represented; allocate a larger cache, "
                "or give patch(alpha=...) to evict frames that leave the window"
            )
        new = end - self.end
        self._notice_other_average(new, end - self.origin)
        self.cache.begin_chunk(frames, reopen=frames - new)
        self._done(self.origin, end, frames)

    def _recache(self, start: int, frames: int, rewrites_sink: bool) -> None:
        sink, window, age = self.window.sink, self.window.frames, self.end - self.origin
        place = min(age, self.window.held) - frames  # in their cache
        touched = max(0, sink - place)
        if touched and self.family.protects_sink and not rewrites_sink:
            kept = min(frames - touched, window)
        elif touched == 0:
            kept = min(frames, window)
        elif age <= sink + window:
            kept = frames
        elif place == 0:
            self._restart(start, frames)
            return
        else:
            kept = 0
        if place < 0 or kept < 1:
            raise ValueError(
                f"a recache must be of frames of the window, or of the whole cache, got {frames} frames at {start} "
                f"with {sink} sink and {window} window frames"
            )
        self.cache.begin_chunk(kept, reopen=kept)
        self._done(self.origin, self.end, frames, frames - kept)

    def _notice_other_average(self, new: int, age: int) -> None:
        """Warns, once, where the family's own average (no ``alpha`` was given) would not average."""
        sink, published = self.window.sink, self.window.alpha is self.family.alpha and self.family.alpha != 1.0
        if published and sink and new != sink and age > sink + self.window.frames and not self._warned:
            self._warned = True
            warnings.warn(
                f"{new} frames are evicted by one chunk, with sink_size={sink}: each is averaged into its sink slot, "
                f"where {self.family.name} averages only sink_size frames at once and overwrites the sink otherwise",
                stacklevel=6,
            )


def _mark(kv_cache: KVCache) -> tuple[weakref.ref, int]:
    """What changes when the indices of a cache are reset. Reads no value."""
    index = kv_cache[0]["global_end_index"]
    return weakref.ref(index), 0 if index.is_inference() else index._version
