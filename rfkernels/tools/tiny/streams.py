"""The small model at work: streams of it under several sinks, and what is measured of them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...models import CausalWan, StreamingSampler, from_pretrained
from .. import extras_folder
from . import clips, metrics
from .presets import PRESETS

FRAMES_PER_SECOND = 4  # latent frames; what 5 s and 60 s mean here


@dataclass(frozen=True)
class Sink:
    """sink_frames and alpha of a cache, by a name."""

    name: str
    frames: int
    alpha: float


SINKS = (
    Sink("no sink", 0, 1.0),
    Sink("static sink", 3, 1.0),
    Sink("EMA 0.999", 3, 0.999),
    Sink("EMA 0.99", 3, 0.99),
    Sink("EMA 0.9", 3, 0.9),
)


@dataclass
class Stream:
    """frames ``[B, F, 3, h, w]`` in 0..1, the seconds they took, and the bytes of the cache."""

    frames: torch.Tensor
    seconds: float
    nbytes: int


def shipped() -> Path:
    """The folder of the trained student that comes with the sources: weights, and how they were made.

    Raises:
        FileNotFoundError: this installation has none.
    """
    for folder in (Path(__file__).with_name("weights"), extras_folder("weights")):
        if folder is not None and (folder / "config.json").exists():
            return folder
    raise FileNotFoundError(
        "this install has no weights for the demo: they are in the source tree and in the package rfkernels-extras; "
        "or python -m rfkernels train --preset tiny makes some, for demo --model"
    )


def load(folder: Path | None = None, device: torch.device | str = "cpu") -> CausalWan:
    """The shipped student, or the one of a folder, in float32."""
    return from_pretrained(folder or shipped(), dtype=torch.float32).to(device).eval()


def sampler(model: CausalWan, streams: int, sink: Sink, **options: Any) -> StreamingSampler:
    """A sampler as the student was trained, with another sink."""
    tiny = PRESETS["tiny"]
    return StreamingSampler(
        model, tiny.steps, tiny.shift, chunk_frames=tiny.chunk_frames, sink_frames=sink.frames,
        window_frames=tiny.window_frames, alpha=sink.alpha, height=clips.SIZE,
        width=clips.SIZE, batch_size=streams, **options,
    )  # fmt: skip


def stream(
    model: CausalWan, conditions: Sequence[clips.Condition], frames: int, sink: Sink, seed: int = 0,
    progress: bool | None = False,
) -> Stream:  # fmt: skip
    """Streams all conditions in one batch."""
    made = sampler(model, len(conditions), sink)
    begin, chunks = time.perf_counter(), []
    for chunk in made.stream(clips.context(conditions).to(model.device), frames, seed, progress=progress):
        chunks.append(metrics.decode(chunk.cpu()))
    return Stream(torch.cat(chunks, 1), time.perf_counter() - begin, made.cache.nbytes)


def measure(frames: torch.Tensor, conditions: Sequence[clips.Condition], segment: int) -> dict[str, torch.Tensor]:
    """Each metric for each stream, ``[B]``."""
    return {
        "motion": metrics.displacement(frames).mean(1).float(),
        "flicker": metrics.flicker(frames),
        "drift": metrics.drift(frames, segment),
        "sharpness": metrics.sharpness(frames).mean(1),
        "fidelity": metrics.fidelity(frames, [c.photo for c in conditions]),
    }


def summary(values: torch.Tensor) -> tuple[float, float]:
    """Mean and standard error."""
    return values.mean().item(), (values.std() / math.sqrt(len(values))).item()


def differ(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two sets of streams, of the same conditions and seeds in order, differ by more than two standard errors
    of their differences."""
    mean, error = summary(a - b)
    return abs(mean) > 2 * error


def moving_conditions(number: int) -> list[clips.Condition]:
    """``number`` conditions in which the camera moves: all photographs and motions in turn."""
    photos, motions = len(clips.PHOTOS), [i for i, m in enumerate(clips.MOTIONS) if m != "still"]
    return [clips.Condition(i % photos, motions[(i + i // photos) % len(motions)]) for i in range(number)]


def real(conditions: Iterable[clips.Condition], frames: int, seed: int = 0) -> torch.Tensor:
    """Clips that were rendered, in 0..1: what the model was to learn."""
    import numpy as np

    rng = np.random.default_rng((13, seed))
    return metrics.decode(torch.stack([clips.clip(condition, frames, rng)[0] for condition in conditions]))
