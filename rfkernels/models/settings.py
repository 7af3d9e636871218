"""What a stream is made by: shared by the sampler, by rollouts and by the training's configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any

import torch

from .. import checks
from ..losses.schedule import FlowMatchSchedule


@dataclass(frozen=True)
class StreamSettings:
    """How a stream is generated, chunk by chunk. The defaults are the published ones (arXiv 2512.04678).

    Args:
        steps: falling, unshifted, within (0, 1000]; shift: see `FlowMatchSchedule`.
        chunk_frames: latent frames of a chunk, or of one chunk after another, the last for all that follow;
            first_chunk_frames: of the very first one, e.g. 1.
        sink_frames, window_frames, alpha: of the cache; the window holds at least a chunk.
        context_noise: timestep in 0..1000 (shifted) of the pass over the clean chunk. As published it sets the timestep
            only; with add_context_noise the chunk is also mixed with noise to that level.

    Raises:
        ValueError, TypeError: naming the field.
    """

    steps: Sequence[float] = (1000, 750, 500, 250)
    shift: float = 5.0
    chunk_frames: int | Sequence[int] = 3
    first_chunk_frames: int | None = None
    sink_frames: int = 3
    window_frames: int = 6
    alpha: float | Sequence[float] | torch.Tensor = 0.999
    context_noise: float = 0.0
    add_context_noise: bool = False

    def __post_init__(self) -> None:
        checks.integer("sink_frames", self.sink_frames, 0)
        checks.chunks(self.chunk_frames, self.first_chunk_frames, self.window_frames)
        checks.number("context_noise", self.context_noise, 0, 1000)
        self.schedule.timesteps(self.steps)

    @classmethod
    def split(cls, options: dict[str, Any]) -> tuple[StreamSettings, dict[str, Any]]:
        """The settings among ``options``, and the rest, which is for the cache."""
        names = {field.name for field in fields(StreamSettings)}
        own = {name: value for name, value in options.items() if name in names}
        return StreamSettings(**own), {name: value for name, value in options.items() if name not in names}

    @property
    def schedule(self) -> FlowMatchSchedule:
        """The noise schedule with this shift."""
        return FlowMatchSchedule(self.shift)

    @property
    def cache(self) -> dict[str, Any]:
        """The arguments of `EMASinkCache` that are set here."""
        return {"sink_frames": self.sink_frames, "window_frames": self.window_frames, "alpha": self.alpha}

    def next_chunk(self, frames_so_far: int) -> int:
        """Frames of the next chunk of a stream."""
        return next_chunk(self.chunk_frames, self.first_chunk_frames, frames_so_far)

    def chunks(self, num_frames: int, frames_so_far: int = 0) -> list[int]:
        """How ``num_frames`` further frames of a stream are cut into chunks; the last may be short."""
        return cut(self.chunk_frames, self.first_chunk_frames, num_frames, frames_so_far)


def next_chunk(chunk_frames: int | Sequence[int], first_chunk_frames: int | None, frames_so_far: int) -> int:
    """Frames of the chunk that begins after ``frames_so_far`` frames; the last listed one serves all that follow."""
    if frames_so_far == 0 and first_chunk_frames is not None:
        return first_chunk_frames
    if isinstance(chunk_frames, int):
        return chunk_frames
    for end in accumulate(chunk_frames):
        if end > frames_so_far:
            return end - frames_so_far
    return chunk_frames[-1]


def cut(
    chunk_frames: int | Sequence[int], first_chunk_frames: int | None, num_frames: int, frames_so_far: int = 0
) -> list[int]:
    """The one way in which a clip is cut: for streams, rollouts, masks and losses."""
    lengths: list[int] = []
    while (left := num_frames - sum(lengths)) > 0:
        lengths.append(min(left, next_chunk(chunk_frames, first_chunk_frames, frames_so_far + sum(lengths))))
    return lengths
