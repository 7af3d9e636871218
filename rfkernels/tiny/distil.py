"""Distillation of the causal student: Re-DMD, and DMD as its case beta = 0 (arXiv 2512.04678)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch

from ..losses import FlowMatchSchedule, ReDMDLoss
from ..models import CausalWan, save_checkpoint
from . import clips, metrics
from .loop import draws, train
from .phases import descend, new_model, optimiser, rate
from .presets import TrainPreset

STUDENT, CRITIC = 4, 5  # first key of what is drawn


def roll_out(
    student: CausalWan, preset: TrainPreset, conditions: Sequence[clips.Condition], *key: int, grad: bool
) -> torch.Tensor:
    """Clean latents ``[B, preset.frames, C, h, w]``: the end of a clip that the student streams through its own cache.

    The clip is up to twice as long, so that frames have left the window and the sink has moved. All chunks leave at one
    denoising step, drawn at random, which alone has a gradient, and only in the frames that are returned.
    """
    generator = draws(preset.seed, *key)
    timesteps = FlowMatchSchedule(preset.shift).timesteps(preset.steps)
    last = int(torch.randint(len(timesteps), (), generator=generator))
    size = preset.chunk_frames
    before = size * int(torch.randint(preset.frames // size + 1, (), generator=generator))
    cache = student.make_cache(
        len(conditions), clips.SIZE, clips.SIZE, sink_frames=preset.sink_frames, window_frames=preset.window_frames,
        alpha=preset.alpha,
    )  # fmt: skip
    context, kept = clips.context(conditions), []
    for first in range(0, before + preset.frames, size):
        shape = (len(conditions), size, 3, clips.SIZE, clips.SIZE)
        x = torch.randn(shape, generator=generator)
        cache.begin_chunk(size)
        past = [layer.context() for layer in cache]
        for number in range(last + 1):
            times = torch.full((len(x),), timesteps[number])
            with torch.set_grad_enabled(grad and number == last and first >= before):
                clean = FlowMatchSchedule.clean(x, student(x, times, context, contexts=past), times)
            if number < last:
                x = FlowMatchSchedule.add_noise(clean, torch.randn(shape, generator=generator), timesteps[number + 1])
        with torch.no_grad():
            student(clean, torch.zeros(len(clean)), context, cache)
        if first >= before:
            kept.append(clean)
    return torch.cat(kept, 1)


def noised(clean: torch.Tensor, preset: TrainPreset, generator: torch.Generator):
    """noisy, noise, timesteps: one noise level a clip, shifted, within 2-98 %."""
    uniform = torch.rand(len(clean), generator=generator)
    timesteps = FlowMatchSchedule(preset.shift).timestep(1000 * uniform).clamp(20, 980)
    noise = torch.randn(clean.shape, generator=generator)
    return FlowMatchSchedule.add_noise(clean, noise, timesteps), noise, timesteps


def student(preset: TrainPreset, folder: Path, name: str, beta: float, **options) -> float | None:
    """A student by (Re-)DMD, its weights averaged over steps; from the ODE student, the critic from the teacher."""
    teacher = new_model(preset, folder / "teacher").requires_grad_(False)
    model, critic = new_model(preset, folder / "ode"), new_model(preset, folder / "teacher")
    average = copy.deepcopy(model).requires_grad_(False)
    # The Re-DMD loss divides by the number of elements, and its gradients are as small as that: hence eps.
    optimise, optimise_critic = (optimiser(m, (0.0, 0.99), 1e-12) for m in (model, critic))
    redmd = ReDMDLoss(beta, preset.guidance)
    size = preset.student_batch

    def critic_step(*key: int) -> float:
        conditions = clips.random_conditions(size, preset.seed, CRITIC, *key)
        clean = roll_out(model, preset, conditions, CRITIC, *key, grad=False)
        noisy, noise, timesteps = noised(clean, preset, draws(preset.seed, CRITIC, *key, 1))
        flow = critic(noisy, timesteps, clips.context(conditions))
        loss = (flow - (noise - clean)).square().mean()
        descend(critic, optimise_critic, loss, rate(key[0], preset.student_steps, preset.critic_rate, 10))
        return loss.item()

    def step(number: int) -> dict[str, float]:
        conditions = clips.random_conditions(size, preset.seed, STUDENT, number)
        x = roll_out(model, preset, conditions, STUDENT, number, grad=True)
        noisy, _, timesteps = noised(x.detach(), preset, draws(preset.seed, STUDENT, number, 1))
        context = clips.context(conditions)
        with torch.no_grad():
            flows = [
                net(noisy, timesteps, c) for net, c in ((critic, context), (teacher, context), (teacher, 0 * context))
            ]
            fake, cond, uncond = (FlowMatchSchedule.clean(noisy, flow, timesteps) for flow in flows)
            rewards = metrics.reward((x.detach().clamp(-1, 1) + 1) / 2, conditions)
        loss = redmd(x, fake, cond, uncond, rewards)
        norm = descend(model, optimise, loss, rate(number, preset.student_steps, preset.student_rate, 10), 0.1)
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.05 if number > 20 else 1.0)
        losses = [critic_step(number, i) for i in range(preset.critic_steps)]
        return {
            "loss": loss.item(), "gradient_norm": norm, "critic_loss": sum(losses) / len(losses),
            "reward": rewards.mean().item(),
        }  # fmt: skip

    state = (model, critic, average, optimise, optimise_critic)
    seconds = train(folder / name, preset.student_steps, step, state, preset.save_every, **options)
    if seconds is not None:
        save_checkpoint(average, folder / name)
    return seconds
