"""Settings of Re-DMD distillation."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from .. import checks
from ..models.settings import StreamSettings

AUTOCAST = {None: None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ReDMDConfig(StreamSettings):
    """Settings of a `ReDMDTrainer`. The defaults are the published ones ("Reward Forcing", arXiv 2512.04678), for
    float32; `published` adds what belongs to a run on GPUs.

    Args:
        the fields of `StreamSettings`, and grad_frames, last_step_only, same_step: of the student's rollout, see
            `SelfForcingRollout`.
        num_frames, height, width: of a training clip's latents.
        beta, guidance_scale, fake_guidance_scale, max_weight: of the loss, see `ReDMDLoss`.
        normalize_weights: divide the weights by their mean over all samples of a step (micro-batches and ranks).
        timestep_bounds: of the scores and of the critic, in 0..1000; uniform for each clip, shifted by ``shift``.
        lr, critic_lr, betas, weight_decay: of AdamW.
        generator_every: the student learns in every so many steps, the critic in each.
        accumulation: micro-batches of a step.
        max_grad_norm: of either network; None does not clip.
        ema_decay, ema_start: moving average of the student's weights, float32, beginning as a copy after that step.
        total_steps: where `ReDMDTrainer.train` ends.
        autocast: "bfloat16", or None. (With FSDP2 use `shard`'s dtype instead.)
        seed: of noise, timesteps and choice of steps, which depend on (seed, step, sample) alone.

    Raises:
        ValueError, TypeError: naming the field.
    """

    num_frames: int = 21
    height: int = 60
    width: int = 104
    grad_frames: int = 21
    last_step_only: bool = False
    same_step: bool = True
    beta: float = 2.0
    guidance_scale: float = 3.0
    fake_guidance_scale: float = 0.0
    max_weight: float | None = None
    normalize_weights: bool = False
    timestep_bounds: tuple[float, float] = (20.0, 980.0)
    lr: float = 2e-6
    critic_lr: float = 4e-7
    betas: tuple[float, float] = (0.0, 0.999)
    weight_decay: float = 0.01
    generator_every: int = 5
    accumulation: int = 1
    max_grad_norm: float | None = 10.0
    ema_decay: float = 0.99
    ema_start: int = 200
    total_steps: int = 601
    autocast: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        positive = "num_frames height width grad_frames generator_every accumulation total_steps"
        for name in positive.split():
            checks.integer(name, getattr(self, name), 1)
        for name in ("ema_start", "seed"):
            checks.integer(name, getattr(self, name), 0)
        for name, low in (("lr", 0), ("critic_lr", 0), ("weight_decay", 0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if self.max_grad_norm is not None and not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm must be positive or None, got {self.max_grad_norm}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.autocast not in AUTOCAST:
            raise ValueError(f"autocast must be one of {list(AUTOCAST)}, got {self.autocast!r}")
        self.schedule.random_timesteps(0, self.timestep_bounds)

    @classmethod
    def published(cls, **changes: Any) -> ReDMDConfig:
        """The published run: 8 accumulated micro-batches, 601 steps, bfloat16; with fields changed."""
        defaults: dict[str, Any] = {"accumulation": 8, "autocast": "bfloat16"}
        return cls(**defaults | changes)

    @property
    def rollout(self) -> dict[str, Any]:
        """The arguments of `SelfForcingRollout`."""
        names = (*(field.name for field in fields(StreamSettings)), "grad_frames", "last_step_only", "same_step")
        return {name: getattr(self, name) for name in names}
