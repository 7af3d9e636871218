"""An `EMASinkCache` behind the list of dicts that pipelines of the Self-Forcing family keep and pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional

from ..attention import chunk_attention, streaming_attention
from ..cache import EMASinkCache
from ..contexts import Context
from ..rope import Rope3D

_ENTRIES = {"k", "v", "global_end_index", "local_end_index"}
_STREAM = "rfkernels"  # the entry of the first dict that holds the stream


class Rules(NamedTuple):
    """What the caches of a patched model are made with."""

    alpha: Any  # given by the user, or None
    published_alpha: float
    sink_positions: str
    sink_dtype: torch.dtype | str | None
    sink_stays_visible: bool  # also where the cache is larger than what attention sees


class LayerPast:
    """What stands in the place of a layer's dict during one call of the model."""

    def __init__(self, stream: Stream, index: int, dropped: int):
        self.stream, self.index, self.dropped = stream, index, dropped
        self.chunk, self.context = stream.chunk, None
        self.context: Context | None

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the open chunk, q, k, v ``[B, F * T, H, D]`` un-rotated; writes k and v."""
        skipped = self.dropped * self.stream.cache.frame_tokens
        if skipped:
            q, k, v = (y[:, skipped:] for y in (q, k, v))
        if torch.is_grad_enabled() and any(y.requires_grad for y in (q, k, v)):
            out = self._differentiable(q, k, v)
        else:
            out = streaming_attention(q, k, v, self.stream.cache[self.index])
        return functional.pad(out, (0, 0, 0, 0, skipped, 0)) if skipped else out

    def _differentiable(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """On the past as it was when the call was made: checkpointing comes back later, and must not write."""
        if self.context is None:
            if self.chunk != self.stream.chunk:
                raise RuntimeError(
                    "a layer is computed again after its chunk was closed: checkpoint with use_reentrant=False"
                )
            layer = self.stream.cache[self.index]
            self.context = layer.context()
            layer.write(k.detach(), v.detach())
        return chunk_attention(q, k, v, self.context)


class Stream:
    """The cache behind one list of dicts, and where its video is.

    A call is of the open chunk while its frames are the same; else it opens one. That the pipeline has begun another
    video shows in its counter, ``global_end_index``, which is another tensor then or has been written; only then is a
    value read from the device.
    """

    def __init__(self, dicts: list[dict[str, Any]], cache: EMASinkCache, limit: int | None):
        self.dicts, self.cache, self.limit = dicts, cache, limit
        self.first, self.frames = 0, 0  # of the video: the index of our frame 0, and how many there are
        self.span: tuple[int, int] | None = None  # first frame and number of frames of the last call
        self.chunk = 0  # counts calls of begin_chunk
        self.sizes = [dicts[0]["k"].shape, dicts[0]["v"].shape]
        for index, held in enumerate(dicts):
            held["k"], held["v"] = cache.k[index], cache.v[index]
        self.own_k = dicts[0]["k"]
        self._remember()

    def _remember(self) -> None:
        counter = self.dicts[0]["global_end_index"]
        self.counter, self.version = counter, None if counter.is_inference() else counter._version

    def _notice_reset(self) -> None:
        counter = self.dicts[0]["global_end_index"]
        if counter is self.counter and self.version is not None and counter._version == self.version:
            return
        end, tokens = int(counter), self.cache.frame_tokens
        if end == 0:
            self._restart(0)
        elif end != (self.first + self.frames) * tokens:
            raise ValueError(
                f"kv_cache must be as this model left it, or begin a new video: its global_end_index is {end}, the "
                f"last call ended at {(self.first + self.frames) * tokens}"
            )
        self._remember()

    def _restart(self, first: int) -> None:
        self.cache.reset()
        self.first, self.frames, self.span = first, 0, None

    def open(self, frames: int, current_start: int, recache: bool) -> list[LayerPast]:
        """The layers for a call on ``frames`` frames from token ``current_start``; opens their chunk if it is not open.

        recache: the frames replace everything, sinks included (LongLive's ``sink_recache_after_switch``).
        """
        self._notice_reset()
        tokens, cache = self.cache.frame_tokens, self.cache
        if current_start % tokens:
            raise ValueError(f"current_start must be whole frames of {tokens} tokens, got {current_start}")
        start = current_start // tokens
        if recache and start + frames == self.first + self.frames and start > self.first:
            self._restart(start)
        dropped = 0
        if self.frames > cache.sink_frames + cache.window_frames:
            # What is computed again behind the window are frames whose sinks stay: they are read by nobody.
            dropped = max(0, frames - cache.window_frames)
        if self.span != (start, frames):
            self._begin(start, frames, dropped)
        return [LayerPast(self, index, dropped) for index in range(len(self.dicts))]

    def _begin(self, start: int, frames: int, dropped: int) -> None:
        held, end = self.first + self.frames, start + frames
        new = end - held
        if not 0 <= new <= frames or start < self.first:
            raise ValueError(
                f"current_start must continue the video, which has {held} frames, or be of its newest ones: got frames "
                f"{start} to {end}"
            )
        if new and dropped:
            raise ValueError(
                f"x must have at most {self.cache.window_frames} frames once some left the window, got {frames}"
            )
        if self.limit is not None and end - self.first > self.limit:
            raise ValueError(
                f"kv_cache holds {self.limit} frames, from which nothing is evicted there, got frames up to {end}: set "
                "local_attn_size, or make the cache larger"
            )
        self.cache.begin_chunk(frames - dropped, reopen=frames - dropped - new)
        self.chunk += 1
        self.frames, self.span = end - self.first, (start, frames)
        tokens, capacity = self.cache.frame_tokens, self.sizes[0][1]
        with torch.no_grad():
            for layer in self.dicts:
                layer["global_end_index"].fill_(end * tokens)
                layer["local_end_index"].fill_(min(self.frames * tokens, capacity))
        self._remember()

    def release(self) -> None:
        """Gives the dicts tensors of their own again, empty."""
        if self.dicts[0].get(_STREAM) is not self:
            return
        del self.dicts[0][_STREAM]
        for layer in self.dicts:
            for name, size in zip("kv", self.sizes, strict=True):
                layer[name] = torch.zeros(size, dtype=self.cache.dtype, device=self.cache.device)
            for name in ("global_end_index", "local_end_index"):
                layer[name].zero_()


def stream_of(
    dicts: list[dict[str, Any]], attention: Any, freqs: torch.Tensor, grid: list[int], rules: Rules
) -> Stream:
    """The stream of a list of dicts; made, and kept in the first dict, where there is none or its tensors are new."""
    stream = dicts[0].get(_STREAM)
    if stream is None or dicts[0]["k"] is not stream.own_k:
        stream = _new_stream(dicts, attention, freqs, grid, rules)
        dicts[0][_STREAM] = stream
    rope = stream.cache.rope
    if rope is not None and [rope.height, rope.width] != grid[1:]:
        raise ValueError(
            f"x must have frames of {rope.height} x {rope.width} tokens as before, got {grid[1]} x {grid[2]}"
        )
    return stream


def _new_stream(
    dicts: list[dict[str, Any]], attention: Any, freqs: torch.Tensor, grid: list[int], rules: Rules
) -> Stream:
    for layer in dicts:
        _check_entries(layer)
    if int(dicts[0]["global_end_index"]):
        raise ValueError("kv_cache must be empty at the first call of a patched model: patch between videos")
    batch, size, heads, head_dim = dicts[0]["k"].shape
    dtype, device = dicts[0]["k"].dtype, dicts[0]["k"].device
    frame_tokens = grid[1] * grid[2]
    held, limited = size // frame_tokens, attention.local_attn_size == -1
    if size % frame_tokens and not limited:
        raise ValueError(f"kv_cache must hold whole frames of {frame_tokens} tokens, got {size} tokens")
    seen = min(held, attention.max_attention_size // frame_tokens)
    if seen < held and attention.max_attention_size % frame_tokens:
        raise ValueError(
            f"max_attention_size of the self-attention must be whole frames of {frame_tokens} tokens, got "
            f"{attention.max_attention_size}: it is fixed for frames of 1560 tokens there, set it for yours"
        )
    sinks = attention.sink_size if rules.sink_stays_visible or seen == held else 0
    if seen <= sinks:
        raise ValueError(f"kv_cache must hold more frames than the {sinks} sinks, got {seen}")
    alpha = rules.alpha
    if alpha is None:
        alpha = 1.0 if seen < held or limited else rules.published_alpha
    if rules.alpha is None and seen < held and rules.published_alpha != 1.0:
        limited = True  # what would be averaged there are frames that had left attention long ago
    cache = EMASinkCache(
        num_layers=len(dicts), batch_size=batch, num_kv_heads=heads, head_dim=head_dim, frame_tokens=frame_tokens,
        sink_frames=sinks, window_frames=seen - sinks, alpha=alpha, rope=_rope(freqs, head_dim, grid),
        sink_positions=rules.sink_positions, dtype=dtype, device=device,
        sink_dtype=dtype if rules.sink_dtype == "published" else rules.sink_dtype,  # type: ignore[arg-type]
    )  # fmt: skip
    return Stream(dicts, cache, held if limited else None)


def _check_entries(layer: dict[str, Any]) -> None:
    extra, lacking = set(layer) - _ENTRIES - {_STREAM}, _ENTRIES - set(layer)
    if extra or lacking:
        kind = f"also {sorted(extra)}" if extra else f"no {sorted(lacking)}"
        raise ValueError(
            f"kv_cache must have the entries {sorted(_ENTRIES)} for each layer, got {kind}: pinned sinks and quantised "
            "caches have no counterpart"
        )
    for name in "kv":
        x = layer[name]
        if not isinstance(x, torch.Tensor) or x.dim() != 4 or not x.is_floating_point():
            raise ValueError(
                f"kv_cache must have floating tensors [B, tokens, heads, D], got {name} {type(x).__name__}"
            )


def _rope(freqs: torch.Tensor, head_dim: int, grid: list[int]) -> Rope3D:
    """The rope of the model's table of complex phases: its row 1 holds the frequencies."""
    rope = Rope3D(head_dim, grid[1], grid[2])
    angles = freqs[1].to("cpu", torch.complex128).angle()
    if torch.allclose(angles, torch.cat(rope.frequencies), rtol=0, atol=1e-12):
        return rope
    return Rope3D(head_dim, grid[1], grid[2], frequencies=angles.split(rope.split))
