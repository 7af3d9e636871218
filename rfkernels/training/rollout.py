"""Self Forcing: the student generates through its own cache, and learns from what it generated."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .. import checks
from ..contract.requests import accumulate_dtype
from ..draws import Generators, draw
from ..models.settings import StreamSettings
from ..models.wan import CausalWan
from ..models.wrappers import unwrapped


class Rollout(NamedTuple):
    """What `SelfForcingRollout` returns.

    Attributes:
        latents: the clean clips, ``[B, N, C, h, w]``.
        first_grad_frame: where gradients are enabled, latents have one from this frame on.
        exit_steps: for each chunk, the index of the denoising step whose prediction it is.
    """

    latents: torch.Tensor
    first_grad_frame: int
    exit_steps: list[int]

    @property
    def graded(self) -> torch.Tensor:
        """The latents from first_grad_frame on, ``[B, n, C, h, w]``, which the scores judge."""
        return self.latents[:, self.first_grad_frame :]


class SelfForcingRollout:
    """Rolls a student out chunk by chunk as inference does, evicting and fusing, with few gradients ("Self Forcing",
    arXiv 2506.08009; "Reward Forcing", arXiv 2512.04678).

    A chunk is denoised down to one randomly chosen step, whose prediction of x0 is the chunk; only that pass has a
    gradient, by `chunk_attention` on the frozen past, and only in the last ``grad_frames`` frames. A pass without
    gradient then leaves the clean chunk in the cache. Recomputation (``model.checkpointing``) is safe.

    Args:
        model: the student, also wrapped by FSDP2.
        steps, shift: the denoising steps, see `StreamSettings`.
        grad_frames: chunks that begin within the last so many frames have a gradient.
        last_step_only: every chunk takes all steps.
        same_step: one choice for all chunks; False: one for each.
        options: the other fields of `StreamSettings`, and further arguments of `EMASinkCache` (dtype, sink_dtype,
            sink_positions).

    Raises:
        ValueError, TypeError: naming the argument.
    """

    def __init__(
        self,
        model: CausalWan,
        steps: Sequence[float] = (1000, 750, 500, 250),
        shift: float = 5.0,
        *,
        grad_frames: int = 21,
        last_step_only: bool = False,
        same_step: bool = True,
        **options: Any,
    ):
        settings, cache_options = StreamSettings.split({"steps": steps, "shift": shift} | options)
        self.model, self.settings, self.schedule = unwrapped("model", model), settings, settings.schedule
        self.timesteps = self.schedule.timesteps(settings.steps)
        self.grad_frames = checks.integer("grad_frames", grad_frames, 0)
        self.last_step_only, self.same_step = bool(last_step_only), bool(same_step)
        self.cache_options = cache_options | settings.cache

    def __call__(
        self,
        context: torch.Tensor,
        num_frames: int,
        height: int,
        width: int,
        *,
        generator: Generators = None,
        exit_generator: torch.Generator | None = None,
        exit_steps: Sequence[int] | None = None,
        initial: torch.Tensor | None = None,
    ) -> Rollout:
        """One clip for each prompt. Under ``torch.no_grad()`` there is no gradient anywhere (for the critic).

        Args:
            context: text embeddings ``[B, n, text_dim]``.
            num_frames, height, width: of the latents.
            generator: of the noise, one or one for each sample.
            exit_generator: of the choice of steps, on the CPU. Where torch.distributed is initialised rank 0 chooses
                for all, so that every rank runs the same passes.
            exit_steps: the choice itself, an index into the steps for each chunk.
            initial: clean latents ``[B, any length, C, h, w]`` to continue from; not returned.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        model = self.model
        checks.embeddings("context", context, model.device)
        checks.integer("num_frames", num_frames, 1)
        batch, channels = len(context), model.config.in_channels
        if initial is not None:
            checks.tensor("initial", initial, 5, model.device)
            checks.shape("initial", initial, batch=batch, frames=None, channels=channels, height=height, width=width)
        given = 0 if initial is None else initial.shape[1]
        chunks = self.settings.chunks(num_frames, given)
        exits = self._exits(len(chunks), exit_generator, exit_steps)
        passes = _Passes(self, context, height, width, generator)
        if initial is not None:
            for past in initial.to(passes.dtype).split(self.settings.chunks(given), 1):
                passes.cache.begin_chunk(past.shape[1])
                passes.write(past)
        done, first_grad, made = 0, num_frames, []
        for frames, last in zip(chunks, exits, strict=True):
            graded = done >= num_frames - self.grad_frames
            first_grad = min(first_grad, done) if graded else first_grad
            clean = passes.chunk(frames, last, graded and torch.is_grad_enabled())
            made.append(clean)
            done += frames
            if done < num_frames:
                passes.write(clean.detach())
        return Rollout(torch.cat(made, 1), first_grad, exits)

    def _exits(self, chunks: int, generator: torch.Generator | None, given: Sequence[int] | None) -> list[int]:
        steps = len(self.timesteps)
        if given is not None:
            if len(given) != chunks:
                raise ValueError(f"exit_steps must have one index for each of {chunks} chunks, got {len(given)}")
            return [checks.integer("exit_steps", step, 0, steps - 1) for step in given]
        if self.last_step_only:
            return [steps - 1] * chunks
        chosen = torch.randint(steps, (1 if self.same_step else chunks,), generator=generator)
        if dist.is_available() and dist.is_initialized():
            chosen = chosen.to(self.model.device)
            dist.broadcast(chosen, 0)
        return chosen.expand(chunks).tolist()


class _Passes:
    """The student's passes over the cache of one rollout."""

    def __init__(
        self, rollout: SelfForcingRollout, context: torch.Tensor, height: int, width: int, generator: Generators
    ):
        model = rollout.model
        self.rollout, self.context, self.generator = rollout, context, generator
        self.shape, self.dtype = (model.config.in_channels, height, width), accumulate_dtype(model.dtype)
        self.cache = model.make_cache(len(context), height, width, **rollout.cache_options)
        with torch.no_grad():
            self.encoded = model.encode_context(context)

    def noise(self, frames: int) -> torch.Tensor:
        size = (len(self.context), frames, *self.shape)
        return draw(torch.randn, size, self.generator, self.cache.device, self.dtype)

    def predict(self, x: torch.Tensor, timestep: float, with_gradient: bool = False) -> torch.Tensor:
        """x0 of the open chunk; without gradient the cache is written."""
        times = torch.full((len(x),), timestep, device=x.device)
        if with_gradient:
            # The embeddings, not their cached keys and values: these have weights too.
            flow = self.rollout.model(x, times, self.context, contexts=[layer.context() for layer in self.cache])
        else:
            with torch.no_grad():
                flow = self.rollout.model(x, times, self.encoded, cache=self.cache)
        return self.rollout.schedule.clean(x, flow, timestep)

    def chunk(self, frames: int, last: int, with_gradient: bool) -> torch.Tensor:
        """The next chunk, denoised down to step ``last``, whose pass may have a gradient."""
        self.cache.begin_chunk(frames)
        x, timesteps = self.noise(frames), self.rollout.timesteps
        for timestep, following in itertools.pairwise(timesteps[: last + 1]):
            clean = self.predict(x, timestep)
            x = self.rollout.schedule.add_noise(clean, self.noise(frames), following)
        return self.predict(x, timesteps[last], with_gradient)

    def write(self, clean: torch.Tensor) -> None:
        """The pass that leaves the clean chunk in the cache."""
        settings = self.rollout.settings
        if settings.add_context_noise and settings.context_noise:
            clean = self.rollout.schedule.add_noise(clean, self.noise(clean.shape[1]), settings.context_noise)
        self.predict(clean, settings.context_noise)
