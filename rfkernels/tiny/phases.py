"""The phases of training: a teacher, its trajectories, and students that come of it.

Each phase is a function ``(preset, folder, ...)`` that reads what earlier phases left in ``folder`` and leaves
its weights in ``folder/NAME``, where its log and its resumable state are too.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..losses import FlowMatchSchedule
from ..models import CausalWan, ChunkMask, load_checkpoint, save_checkpoint
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


def optimiser(model: CausalWan, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), 0.0, betas, eps, weight_decay=0.01)


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


def trajectories(preset: TrainPreset, folder: Path, report: Callable[[str], None] = print) -> float:
    """Clips that the teacher makes by Euler steps, with what they were at each of the student's noise levels.

    Leaves ``NUMBER.safetensors`` with ``states`` ``[B, len(steps), F, C, h, w]``, noisiest first, and ``clean``, in
    float16, and the conditions. Files that exist are kept.
    """
    model, folder = new_model(preset, folder / "teacher"), folder / "trajectories"
    folder.mkdir(parents=True, exist_ok=True)
    falling = [1000 * (1 - i / preset.trajectory_steps) for i in range(preset.trajectory_steps)]
    timesteps = (*FlowMatchSchedule(preset.shift).timesteps(falling), 0.0)
    wanted = [falling.index(step) for step in preset.steps]
    begin = time.perf_counter()
    for number in range(preset.trajectories // preset.trajectory_batch):
        path = folder / f"{number:04}.safetensors"
        if path.exists():
            continue
        conditions = clips.random_conditions(preset.trajectory_batch, preset.seed, TRAJECTORIES, number)
        shape = (len(conditions), preset.frames, 3, clips.SIZE, clips.SIZE)
        x, states = torch.randn(shape, generator=draws(preset.seed, TRAJECTORIES, number)), []
        context = clips.context(conditions)
        with torch.no_grad():
            for timestep, following in itertools.pairwise(timesteps):
                states.append(x)
                x = x + (following - timestep) / 1000 * guided_flow(model, x, timestep, context, preset.guidance)
        pairs = torch.tensor([(c.photo, c.motion) for c in conditions])
        kept = {"states": torch.stack([states[i] for i in wanted], 1).half(), "clean": x.half(), "conditions": pairs}
        save_file(kept, path.with_suffix(".partial"))
        os.replace(path.with_suffix(".partial"), path)
        report(f"trajectories: {(number + 1) * preset.trajectory_batch} of {preset.trajectories}")
    return time.perf_counter() - begin


def guided_flow(model: CausalWan, x: torch.Tensor, timestep: float, context: torch.Tensor, guidance: float):
    """``cond + g (cond - uncond)``, in one batch."""
    times = torch.full((2 * len(x),), timestep)
    both = model(torch.cat([x, x]), times, torch.cat([context, torch.zeros_like(context)]))
    cond, uncond = both.chunk(2)
    return cond + guidance * (cond - uncond)


def ode(preset: TrainPreset, folder: Path, **options) -> float | None:
    """A causal student that learns where the teacher's trajectories end (the initialisation of Self Forcing).

    Teacher forcing: every noisy chunk, each at a noise level of its own, sees the clean chunks before it.
    """
    held = [load_file(path) for path in sorted((folder / "trajectories").glob("*.safetensors"))]
    states, clean, pairs = (torch.cat([h[name] for h in held]) for name in ("states", "clean", "conditions"))
    model = new_model(preset, folder / "teacher")
    optimise = optimiser(model)
    mask = ChunkMask(preset.chunk_frames, preset.sink_frames, preset.window_frames)
    timesteps = torch.tensor(FlowMatchSchedule(preset.shift).timesteps(preset.steps))

    def step(number: int) -> dict[str, float]:
        generator = draws(preset.seed, ODE, number)
        rows = torch.randint(len(clean), (preset.ode_batch,), generator=generator)
        chunks = -(-preset.frames // preset.chunk_frames)
        levels = torch.randint(len(timesteps), (preset.ode_batch, chunks), generator=generator)
        levels = levels.repeat_interleave(preset.chunk_frames, 1)[:, : preset.frames]
        noisy = states[rows[:, None], levels, torch.arange(preset.frames)].float()
        wanted, context = clean[rows].float(), clips.context([clips.Condition(*p) for p in pairs[rows].tolist()])
        flow = model(noisy, timesteps[levels], context, mask=mask, clean=wanted)
        loss = (FlowMatchSchedule.clean(noisy, flow, timesteps[levels]) - wanted).square().mean()
        norm = descend(model, optimise, loss, rate(number, preset.ode_steps, preset.ode_rate))
        return {"loss": loss.item(), "gradient_norm": norm}

    seconds = train(folder / "ode", preset.ode_steps, step, (model, optimise), preset.save_every, **options)
    if seconds is not None:
        save_checkpoint(model, folder / "ode")
    return seconds
