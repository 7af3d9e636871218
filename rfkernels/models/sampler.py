"""Few-step streaming generation: one chunk after another, for as long as wanted, at constant memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from .. import checks
from ..cache import EMASinkCache
from ..contract.requests import accumulate_dtype
from ..draws import Generators, draw, keyed_generator
from .graphs import PassGraphs
from .progress import frames_bar
from .settings import StreamSettings
from .wan import KV
from .wrappers import unwrapped

TextContext = torch.Tensor | Sequence[KV]  # embeddings [B, n, text_dim], or what CausalWan.encode_context made of them


class StreamModel(Protocol):
    """What a `StreamingSampler` asks of a model: of a `CausalWan`, or of an adapter to another transformer.

    ``config.in_channels`` are the latents'; what ``encode_context`` makes of embeddings ``[B, n, text_dim]`` comes back
    as the third argument of each pass; a pass gives the flow of ``[B, F, C, h, w]``, the open chunk of the cache.
    """

    @property
    def config(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def parameters(self) -> Iterator[torch.Tensor]: ...
    def make_cache(self, batch_size: int, height: int, width: int, **options: Any) -> EMASinkCache: ...
    def encode_context(self, context: torch.Tensor) -> Any: ...
    def __call__(self, latents: torch.Tensor, timesteps: torch.Tensor, context: Any, cache: EMASinkCache, /) -> Any: ...


class StreamingSampler:
    """Generates video chunk by chunk with a `CausalWan` and its cache (Self Forcing; Reward Forcing, arXiv 2512.04678).

    A chunk starts as noise; each step predicts the clean chunk and mixes it with fresh noise for the next one. Then a
    pass over the clean chunk writes the keys and values that later chunks see. Noise depends on (seed, stream, chunk)
    only, whatever the batch. Nothing is differentiated.

    Args:
        model: the transformer, or ``torch.compile`` of it, or what stands for one (`StreamModel`).
        steps, shift: the denoising steps, see `StreamSettings`.
        height, width: of a latent frame. batch_size: streams.
        streams: their numbers, which with the seed decide their noise; default 0..batch_size - 1.
        cuda_graph: run passes as CUDA graphs (`PassGraphs`): one for each length of a chunk, recorded at its second
            pass and replayed in all later ones, so that the host launches one thing a pass. Needs a CUDA device; not
            with ``torch.compile(mode="reduce-overhead")``, which has graphs of its own.
        options: the other fields of `StreamSettings` (chunk_frames, first_chunk_frames, sink_frames, window_frames,
            alpha, context_noise, add_context_noise), and further arguments of `EMASinkCache` (sink_dtype,
            sink_positions, dtype).

    Attributes:
        cache: the `EMASinkCache`.
        chunk: number of chunks so far.
        frames: latent frames so far, initial ones included.

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: StreamModel,
        steps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        *,
        height: int = 60,
        width: int = 104,
        batch_size: int = 1,
        streams: Sequence[int] | None = None,
        cuda_graph: bool = False,
        **options: Any,
    ):
        settings, cache_options = StreamSettings.split({"steps": steps, "shift": shift} | options)
        model = unwrapped("model", model)
        self.model, self.settings, self.schedule = model, settings, settings.schedule
        self.timesteps = self.schedule.timesteps(settings.steps)
        batch_size = checks.integer("batch_size", batch_size, 1)
        self.streams = list(range(batch_size) if streams is None else streams)
        if len(self.streams) != batch_size:
            raise ValueError(f"streams must have batch_size={batch_size} numbers, got {len(self.streams)}")
        for stream in self.streams:
            checks.integer("streams", stream, 0)
        self.dtype, self.shape = accumulate_dtype(model.dtype), (model.config.in_channels, height, width)
        self.cache = model.make_cache(batch_size, height, width, **settings.cache, **cache_options)
        self._graphs = PassGraphs(model, self.cache) if cuda_graph else None
        self._given: TextContext | None = None  # the prompt in force
        self._keys: Any = None  # what the model made of it, by weights and prompt of the versions `_encoded_by`
        self._encoded_by: tuple[tuple[int, ...], int] = ((), 0)
        self.seed = 0
        self._forget()

    def _forget(self) -> None:
        self.chunk, self.frames, self._unfinished = 0, 0, 0
        self._recent = torch.zeros(len(self.streams), 0, *self.shape, dtype=self.dtype, device=self.cache.device)

    # --- generation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self,
        context: TextContext | None = None,
        source: torch.Tensor | None = None,
        noise_scale: float | None = None,
        steps: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
        *,
        frames: int | None = None,
    ) -> torch.Tensor:
        """One chunk of clean latents, ``[B, F, C, h, w]`` in float32 (float64 for a float64 model).

        Args:
            context: of this chunk and the following ones; None: the last one. (`switch` also recomputes the window.)
            source: latents ``[B, F, C, h, w]`` of an incoming video. The chunk then starts from
                ``(1 - noise_scale) * source + noise_scale * noise`` at that noise level, and takes the steps below it.
            noise_scale: with source, in (0, 1].
            steps: of this chunk, in place of the sampler's.
            generator: draws the noise, in place of (seed, stream, chunk).
            frames: of this chunk, default as the settings say; with source, as many as it has.

        Raises:
            ValueError, TypeError: naming the argument; nothing has changed then. A chunk that failed later (e.g. out of
                memory) is taken up again by the next call, which must be for as many frames.
        """
        timesteps = self.timesteps if steps is None else self.schedule.timesteps(steps)
        if (source is None) != (noise_scale is None):
            raise ValueError("source and noise_scale go together, got only one of them")
        if source is not None:
            source = self._latents("source", source)
            if frames not in (None, source.shape[1]):
                raise ValueError(f"frames must be those of source, {source.shape[1]}, got {frames}")
            frames, level = source.shape[1], 1000 * checks.number("noise_scale", noise_scale, 0, 1, open_low=True)
            timesteps = (level, *(t for t in timesteps if t < level))
        if frames is None:
            frames = self._next_frames()
        checks.integer("frames", frames, 1, self.cache.window_frames)
        kv = self._encoded(context)
        noise = self._noise(frames, generator)
        self._begin(frames)
        x = next(noise)
        if source is not None:
            x = self.schedule.add_noise(source, x, timesteps[0])
        for timestep, following in zip(timesteps, (*timesteps[1:], None), strict=True):
            clean = self.schedule.clean(x, self._flow(x, timestep, kv), timestep)
            x = clean if following is None else self.schedule.add_noise(clean, next(noise), following)
        self._finish(x, kv, noise)
        return x

    def stream(
        self,
        context: TextContext | None = None,
        num_frames: int | None = None,
        seed: int | None = None,
        initial: torch.Tensor | None = None,
        progress: bool | None = None,
    ) -> Iterator[torch.Tensor]:
        """Chunk after chunk of clean latents, as `step` returns them; goes on from where the sampler is.

        Args:
            num_frames: latent frames to generate (the last chunk may be short); None: without end.
            seed: of the noise, default the last one given (0 at first).
            initial: clean latents ``[B, any length, C, h, w]`` to continue from (an image, a video); not yielded.
            progress: a bar with frames per second; default: if tqdm is there and stderr is a terminal.

        `switch`, `snapshot`, ... may be called between chunks.
        """
        if num_frames is not None:
            checks.integer("num_frames", num_frames, 1)
        if seed is not None:
            self.seed = checks.integer("seed", seed, 0)
        self._encoded(context, anew=context is not None)
        if initial is not None:
            self.extend(initial)
        return self._stream(num_frames, progress)

    def _stream(self, num_frames: int | None, progress: bool | None) -> Iterator[torch.Tensor]:
        with frames_bar(num_frames, progress) as bar:
            done = 0
            while num_frames is None or done < num_frames:
                frames = self._next_frames()
                chunk = self.step(frames=frames if num_frames is None else min(frames, num_frames - done))
                done += chunk.shape[1]
                bar.update(chunk.shape[1])
                yield chunk

    @torch.no_grad()
    def extend(self, latents: torch.Tensor, context: TextContext | None = None) -> None:
        """Takes clean latents ``[B, any length, C, h, w]`` as if they had just been generated, chunk by chunk.

        Raises:
            ValueError, TypeError: as `step`.
        """
        latents, kv = self._latents("latents", latents), self._encoded(context, anew=context is not None)
        for chunk in latents.split(self.settings.chunks(latents.shape[1], self.frames), 1):
            self._begin(chunk.shape[1])
            self._finish(chunk, kv, self._noise(chunk.shape[1]))

    @torch.no_grad()
    def switch(self, context: TextContext, recompute: bool = True) -> None:
        """Another prompt from here on.

        recompute: also one pass over the window's frames under the new prompt, so that their keys and values, which the
            next chunk sees, no longer speak of the old one (as LongLive does). The sink stays as it is, but for frames
            that have not left the window.
        """
        kv, window = self._encoded(context, anew=True), self._recent
        if self._unfinished:
            raise ValueError("the last chunk has failed: run step again, or restore a snapshot, before switching")
        if recompute and window.shape[1]:
            self._open(window.shape[1], reopen=window.shape[1])
            self._write(window, kv, self._noise(window.shape[1], again=1))

    def _next_frames(self) -> int:
        return self._unfinished or self.settings.next_chunk(self.frames)

    def _begin(self, frames: int) -> None:
        if self._unfinished not in (0, frames):
            raise ValueError(f"frames must be {self._unfinished}, those of the chunk that failed, got {frames}")
        self._open(frames, reopen=self._unfinished)
        self._unfinished = frames

    def _open(self, frames: int, reopen: int) -> None:
        self.cache.begin_chunk(frames, reopen)
        if self._graphs is not None:
            self._graphs.renew()

    def _finish(self, clean: torch.Tensor, kv: Any, noise: Iterator[torch.Tensor]) -> None:
        """The pass that leaves the clean chunk in the cache."""
        self._write(clean, kv, noise)
        self._recent = torch.cat([self._recent, clean], 1)[:, -self.cache.window_frames :].contiguous()
        self.chunk, self.frames, self._unfinished = self.chunk + 1, self.frames + clean.shape[1], 0

    def _write(self, clean: torch.Tensor, kv: Any, noise: Iterator[torch.Tensor]) -> None:
        if self.settings.add_context_noise and self.settings.context_noise:
            clean = self.schedule.add_noise(clean, next(noise), self.settings.context_noise)
        self._flow(clean, self.settings.context_noise, kv)

    def _flow(self, x: torch.Tensor, timestep: float, kv: Any) -> torch.Tensor:
        if self._graphs is not None:
            return self._graphs(x, timestep, kv)
        return self.model(x, torch.full((len(x),), timestep, device=x.device), kv, self.cache)

    def _noise(self, frames: int, generator: torch.Generator | None = None, again: int = 0) -> Iterator[torch.Tensor]:
        """Standard normal ``[B, frames, C, h, w]``, one after another, drawn in float32 on the generator's device.

        again: 1 for frames that are recomputed, whose noise must not be that of the chunk to come.
        """
        own: Generators = generator
        size = (len(self.streams), frames, *self.shape)
        if own is None:
            own = [keyed_generator(self.seed, stream, self.chunk, again) for stream in self.streams]
        while True:
            yield draw(torch.randn, size, own, self.cache.device, torch.float32).to(self.dtype)

    @torch.no_grad()
    def _encoded(self, context: TextContext | None, anew: bool = False) -> Any:
        """The prompt's keys and values; kept for as long as the prompt and the weights are the same."""
        checks.no_text("context", context)
        given = self._given if context is None else context
        if given is None:
            raise ValueError("context must be given for the first chunk")
        state = (self._weights(), given._version if isinstance(given, torch.Tensor) and not given.is_inference() else 0)
        if anew or self._keys is None or given is not self._given or state != self._encoded_by:
            batch = given.shape[0] if isinstance(given, torch.Tensor) else given[0][0].shape[0]
            if batch != len(self.streams):
                raise ValueError(f"context must have batch_size={len(self.streams)}, got {batch}")
            keys = self.model.encode_context(given) if isinstance(given, torch.Tensor) else given
            self._given, self._keys, self._encoded_by = given, keys, state
        return self._keys

    def _weights(self) -> tuple[int, ...]:
        """Changes with every optimiser step and every load. (Not where a LoRA is switched: `switch` then.)"""
        return tuple(0 if p.is_inference() else p._version for p in self.model.parameters())

    def _latents(self, name: str, x: torch.Tensor) -> torch.Tensor:
        checks.tensor(name, x, 5, self.cache.device)
        channels, height, width = self.shape
        checks.shape(name, x, batch=len(self.streams), frames=None, channels=channels, height=height, width=width)
        if x.shape[1] == 0:
            raise ValueError(f"{name} must have at least one frame, got shape {tuple(x.shape)}")
        return x.to(self.dtype)

    # --- state --------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reset(self, keep_sink: bool = False) -> None:
        """Starts another video.

        keep_sink: the sink frames stay, as if they were the new video's first frames.
        """
        cache, tokens = self.cache, self.cache.frame_tokens
        kept = min(self.frames, cache.sink_frames) if keep_sink else 0
        fixed = cache.sink_k is None  # sinks that never move have no un-rotated keys
        k = (cache.k[:, :, : kept * tokens] if cache.sink_k is None else cache.sink_k).clone()
        v = cache.sink_v.clone()
        cache.reset()
        self._forget()
        self._keys = None  # encoded anew for the next video, whatever has changed in the model
        for frame in range(kept):
            cache.begin_chunk(1)
            at = slice(frame * tokens, (frame + 1) * tokens)
            for index, layer in enumerate(cache):
                layer.write(k[index][:, at], v[index][:, at])
        if kept and fixed:
            cache.k[:, :, : kept * tokens] = k
        self.frames = kept

    def snapshot(self) -> dict[str, Any]:
        """A copy of the whole state, for `restore`: to branch a stream, or, by ``torch.save``, to go on another day."""
        given = self._given
        held = given if given is None or isinstance(given, torch.Tensor) else [tuple(kv) for kv in given]
        return {
            "cache": self.cache.snapshot(),
            "recent": self._recent.clone(),
            "context": held,
            "seed": self.seed,
            "streams": list(self.streams),
            "counts": [self.chunk, self.frames, self._unfinished],
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes back to a `snapshot` (``torch.load(file, weights_only=True)`` will do), bit for bit.

        Raises:
            ValueError: a snapshot of another sampler. Nothing is changed then.
        """
        names = {"cache", "recent", "context", "seed", "streams", "counts"}
        if set(snapshot) != names:
            raise ValueError(f"snapshot must have the entries {sorted(names)}, got {sorted(snapshot)}")
        recent = snapshot["recent"]
        if recent.shape[2:] != self.shape or len(snapshot["streams"]) != len(self.streams):
            allowed = f"{len(self.streams)} streams of {self.shape}"
            raise ValueError(
                f"snapshot must be of {allowed}, got {len(snapshot['streams'])} of {tuple(recent.shape[2:])}"
            )
        self.cache.restore(snapshot["cache"])
        self._recent = recent.to(self.cache.device, self.dtype, copy=True)
        self.seed, self.streams = snapshot["seed"], list(snapshot["streams"])
        self.chunk, self.frames, self._unfinished = snapshot["counts"]
        self._given = self._keys = None
        if snapshot["context"] is not None:
            self._encoded(_moved(snapshot["context"], self.cache.device))


def _moved(context: TextContext, device: torch.device) -> TextContext:
    if isinstance(context, torch.Tensor):
        return context.to(device)
    return [(k.to(device), v.to(device)) for k, v in context]
