"""How large the small model is and how long each phase of its training takes, by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...models import CausalWanConfig


@dataclass(frozen=True)
class TrainPreset:
    """Sizes, steps, batches and rates of each phase; see `phases`.

    changes: of the fields of the transformer's preset "tiny". frames: latent frames of a clip; chunk_frames,
    sink_frames, window_frames, alpha: of the student. shift, steps: see `FlowMatchSchedule`. guidance: g of
    classifier-free guidance, ``cond + g (cond - uncond)``. dropped: share of training clips without a condition.
    short_frames, short_batch: of the teacher's first ``short_steps`` steps: many views of the photographs for the
    price of one clip.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    frames: int = 12
    chunk_frames: int = 3
    sink_frames: int = 3
    window_frames: int = 6
    alpha: float = 0.99
    shift: float = 3.0
    steps: tuple[float, ...] = (1000, 750, 500, 250)
    guidance: float = 1.0
    dropped: float = 0.1
    seed: int = 0
    save_every: int = 100

    short_frames: int = 3
    short_batch: int = 24
    short_steps: int = 3500
    teacher_steps: int = 6000
    teacher_batch: int = 8
    teacher_rate: float = 3e-3

    trajectories: int = 384
    trajectory_batch: int = 16
    trajectory_steps: int = 12

    ode_steps: int = 400
    ode_batch: int = 8
    ode_rate: float = 3e-4

    student_frames: int = 21  # of a rollout, of which the last ``frames`` are scored and have a gradient
    student_steps: int = 600
    student_batch: int = 4
    student_rate: float = 1e-4
    critic_rate: float = 2e-4
    generator_every: int = 3
    ema_decay: float = 0.95
    ema_start: int = 100
    beta: float = 2.0

    evaluation_streams: int = 20
    evaluation_seconds: tuple[float, ...] = (5, 60)

    def config(self) -> CausalWanConfig:
        return CausalWanConfig.preset("tiny", **self.changes)


_SMALLEST = {"dim": 32, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "freq_dim": 32}
PRESETS = {
    "tiny": TrainPreset(),
    # Every phase in a few seconds: shows that the pipeline runs, not that it learns.
    "seconds": TrainPreset(
        changes=_SMALLEST, save_every=2, short_steps=2, short_batch=3, teacher_steps=4, teacher_batch=2,
        trajectories=4, trajectory_batch=2, trajectory_steps=4, ode_steps=3, ode_batch=2, student_frames=15,
        student_steps=3, student_batch=2, generator_every=1, ema_start=2, evaluation_streams=2,
        evaluation_seconds=(3, 4),
    ),
}  # fmt: skip


def preset(name: str) -> TrainPreset:
    """Raises:
    ValueError: an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
    return PRESETS[name]
