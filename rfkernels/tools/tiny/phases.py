"""The phases of training: a teacher, its trajectories, and students that come of it.

Each phase is a function ``(preset, folder, ...)`` that reads what earlier phases left in ``folder`` and leaves
its weights in ``folder/NAME``, where its log and its resumable state are too.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ...draws import keyed_generator
from ...losses import flow_matching_loss
from ...models import CausalWan, ChunkMask, load_checkpoint, save_checkpoint
from ...training import ReDMDConfig, ReDMDTrainer, collect_trajectories, ode_regression_loss
from . import clips, metrics
from .loop import State, TrainerState, bfloat16_products, train
from .presets import TrainPreset

TEACHER, TRAJECTORIES, ODE, STUDENT = 1, 2, 3, 4  # second key of what a phase draws


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


def optimiser(model: CausalWan) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 0.0, (0.9, 0.99), weight_decay=0.01)


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


def teacher(preset: TrainPreset, folder: Path, **options: Any) -> float | None:
    """A bidirectional model of whole clips by flow matching; some clips without their condition, for guidance."""
    model = new_model(preset)
    optimise = optimiser(model)

    def step(number: int) -> dict[str, float]:
        short = number < preset.short_steps
        size, frames = (preset.short_batch, preset.short_frames) if short else (preset.teacher_batch, preset.frames)
        clean, conditions = clips.batch(size, frames, preset.seed, number)
        generator = keyed_generator(preset.seed, TEACHER, number)
        kept = torch.rand(len(clean), generator=generator) >= preset.dropped
        context = clips.context(conditions) * kept[:, None, None]
        loss = flow_matching_loss(model, clean, context, shift=preset.shift, generator=generator)
        norm = descend(model, optimise, loss, rate(number, preset.teacher_steps, preset.teacher_rate))
        return {"loss": loss.item(), "gradient_norm": norm}

    seconds = train(
        folder / "teacher", preset.teacher_steps, step, State(model, optimise), preset.save_every, **options
    )
    if seconds is not None:
        save_checkpoint(model, folder / "teacher")
    return seconds


@bfloat16_products()
def trajectories(preset: TrainPreset, folder: Path, report: Callable[[str], None] = print) -> float:
    """Clips that the teacher makes, with what they were at each of the student's noise levels.

    Leaves ``NUMBER.safetensors`` with ``states`` as of `collect_trajectories`, in float16, and the conditions. Files
    that exist are kept.
    """
    model, folder = new_model(preset, folder / "teacher"), folder / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    begin, size = time.perf_counter(), preset.trajectory_batch
    for number in range(preset.trajectories // size):
        path = folder / f"{number:04}.safetensors"
        if path.exists():
            continue
        conditions = clips.random_conditions(size, preset.seed, TRAJECTORIES, number)
        shape = (size, preset.frames, 3, clips.SIZE, clips.SIZE)
        noise = torch.randn(shape, generator=keyed_generator(preset.seed, TRAJECTORIES, number))
        states = collect_trajectories(
            model, noise, clips.context(conditions), clips.context([None]), guidance_scale=preset.guidance,
            steps=preset.steps, shift=preset.shift, solver_steps=preset.trajectory_steps,
        )  # fmt: skip
        pairs = torch.tensor([(c.photo, c.motion) for c in conditions])
        save_file({"states": states.half(), "conditions": pairs}, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        report(f"trajectories: {(number + 1) * size} of {preset.trajectories}")
    return time.perf_counter() - begin


def ode(preset: TrainPreset, folder: Path, **options: Any) -> float | None:
    """A causal student that learns where the teacher's trajectories end; noisy chunks see the clean past."""
    held = [load_file(path) for path in sorted((folder / "trajectories").glob("*.safetensors"))]
    states, pairs = (torch.cat([h[name] for h in held]) for name in ("states", "conditions"))
    model = new_model(preset, folder / "teacher")
    optimise = optimiser(model)
    mask = ChunkMask(preset.chunk_frames, preset.sink_frames, preset.window_frames)

    def step(number: int) -> dict[str, float]:
        generator = keyed_generator(preset.seed, ODE, number)
        rows = torch.randint(len(states), (preset.ode_batch,), generator=generator)
        context = clips.context([clips.Condition(*pair) for pair in pairs[rows].tolist()])
        loss = ode_regression_loss(
            model, states[rows].float(), context, mask, steps=preset.steps, shift=preset.shift, teacher_forcing=True,
            generator=generator,
        )  # fmt: skip
        norm = descend(model, optimise, loss, rate(number, preset.ode_steps, preset.ode_rate))
        return {"loss": loss.item(), "gradient_norm": norm}

    seconds = train(folder / "ode", preset.ode_steps, step, State(model, optimise), preset.save_every, **options)
    if seconds is not None:
        save_checkpoint(model, folder / "ode")
    return seconds


def student(preset: TrainPreset, folder: Path, name: str, beta: float, **options: Any) -> float | None:
    """A student by Re-DMD, or by DMD where ``beta`` is 0: from the ODE student, the critic from the teacher."""
    config = ReDMDConfig(
        num_frames=preset.student_frames, height=clips.SIZE, width=clips.SIZE, steps=preset.steps, shift=preset.shift,
        chunk_frames=preset.chunk_frames, sink_frames=preset.sink_frames, window_frames=preset.window_frames,
        alpha=preset.alpha, grad_frames=preset.frames, beta=beta, guidance_scale=preset.guidance,
        lr=preset.student_rate, critic_lr=preset.critic_rate, betas=(0.0, 0.99), max_grad_norm=1.0,
        generator_every=preset.generator_every, ema_decay=preset.ema_decay, ema_start=preset.ema_start,
        total_steps=preset.student_steps, seed=preset.seed,
    )  # fmt: skip
    teacher, critic = (new_model(preset, folder / "teacher") for _ in range(2))
    trainer = ReDMDTrainer(
        new_model(preset, folder / "ode"),
        teacher,
        critic,
        clips.context([None]),
        metrics.reward,
        metrics.decode,
        config,
    )

    def step(number: int) -> dict[str, float]:
        conditions = clips.random_conditions(preset.student_batch, preset.seed, STUDENT, number)
        measured = trainer.step([(clips.context(conditions), conditions)])
        return {key: value.float().mean().item() for key, value in measured.items()}

    state = TrainerState(trainer)
    seconds = train(folder / name, preset.student_steps, step, state, preset.save_every, **options)
    if seconds is not None:
        averaged = new_model(preset)
        averaged.load_state_dict(trainer.ema or trainer.student.state_dict())
        save_checkpoint(averaged, folder / name)
    return seconds
