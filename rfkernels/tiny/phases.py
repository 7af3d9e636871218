"""The phases of training: a teacher, its trajectories, and students that come of it.

Each phase is a function ``(preset, folder, ...)`` that reads what earlier phases left in ``folder`` and leaves
its weights in ``folder/NAME``, where its log and its resumable state are too.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

from ..losses import FlowMatchSchedule
from ..models import CausalWan, load_checkpoint, save_checkpoint
from . import clips
from .loop import draws, train
from .presets import TrainPreset

TEACHER, TRAJECTORIES, ODE = 1, 2, 3  # first key of what a phase draws


def new_model(preset: TrainPreset, weights: Path | None = None) -> CausalWan:
    torch.manual_seed(preset.seed)
    model = CausalWan(preset.config())
    if weights is not None:
        load_checkpoint(model, weights)
    return model


def rate(step: int, steps: int, highest: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine down to a fiftieth."""
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return highest * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return highest * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def optimiser(model: CausalWan, betas: tuple[float, float] = (0.9, 0.99)) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 0.0, betas, weight_decay=0.01)


def descend(
    model: CausalWan, optimiser: torch.optim.Optimizer, loss: torch.Tensor, lr: float, largest: float = 1.0
) -> float:
    """One step with a clipped gradient, whose norm is returned."""
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    optimiser.step()
    return norm.item()


def teacher(preset: TrainPreset, folder: Path, **options) -> float | None:
    """A bidirectional model of whole clips by flow matching; some clips without their condition, for guidance."""
    model = new_model(preset)
    optimise = optimiser(model)

    def step(number: int) -> dict[str, float]:
        clean, conditions = clips.batch(preset.teacher_batch, preset.frames, preset.seed, number)
        generator = draws(preset.seed, TEACHER, number)
        kept = torch.rand(len(clean), generator=generator) >= preset.dropped
        context = clips.context(conditions) * kept[:, None, None]
        timesteps = FlowMatchSchedule(preset.shift).timestep(1000 * torch.rand(len(clean), generator=generator))
        noise = torch.randn(clean.shape, generator=generator)
        flow = model(FlowMatchSchedule.add_noise(clean, noise, timesteps), timesteps, context)
        loss = (flow - (noise - clean)).square().mean()
        norm = descend(model, optimise, loss, rate(number, preset.teacher_steps, preset.teacher_rate))
        return {"loss": loss.item(), "gradient_norm": norm}

    seconds = train(folder / "teacher", preset.teacher_steps, step, (model, optimise), preset.save_every, **options)
    if seconds is not None:
        save_checkpoint(model, folder / "teacher")
    return seconds
