"""How a causal student begins: by regression on the trajectories of a bidirectional teacher (CausVid, Self Forcing)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch

from .. import checks
from ..draws import Generators, draw
from ..losses.flow import squared_error
from ..losses.schedule import FlowMatchSchedule
from ..models.settings import cut
from ..models.wan import ChunkMask
from .guidance import guided_flow, predict_clean


@torch.no_grad()
def collect_trajectories(
    teacher: Callable[..., torch.Tensor],
    noise: torch.Tensor,
    context: torch.Tensor,
    uncond: torch.Tensor | None = None,
    *,
    guidance_scale: float = 3.0,
    steps: Sequence[float] = (1000, 750, 500, 250),
    shift: float = 5.0,
    solver_steps: int = 48,
) -> torch.Tensor:
    """Follows the teacher's probability-flow ODE from noise to a clip, by Euler steps on the shifted schedule.

    Args:
        teacher: predicts the flow of whole clips, e.g. a `CausalWan` without mask.
        noise: standard normal ``[B, F, C, h, w]``. context: ``[B, n, text_dim]``; uncond: ``[1 or B, n, text_dim]``,
            what guidance leads away from.
        guidance_scale: g of ``cond + g * (cond - uncond)``.
        steps, shift: the student's; the solver stops at each of them. The first must be 1000, where the noise is.
        solver_steps: Euler steps in all, spread over the gaps between the student's steps, at least one in each.

    Returns:
        ``[B, len(steps) + 1, F, C, h, w]``: x_t at each of the student's steps, then the clean clip.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    schedule, grid = FlowMatchSchedule(shift), (*steps, 0.0)
    schedule.timesteps(steps)
    if steps[0] != 1000:
        raise ValueError(f"steps must begin with 1000, pure noise, got {steps[0]}")
    checks.tensor("noise", noise, 5)
    checks.embeddings("context", context)
    if uncond is not None:
        checks.embeddings("uncond", uncond)
    checks.integer("solver_steps", solver_steps, len(steps))
    x, kept = noise, [noise]
    for start, end in itertools.pairwise(grid):
        parts = max(1, round(solver_steps * (start - end) / 1000))
        times = [schedule.timestep(start + (end - start) * i / parts) for i in range(parts + 1)]
        for t, following in itertools.pairwise(times):
            now = torch.full((len(x),), t, device=x.device)
            x = x + (following - t) / 1000 * guided_flow(teacher, x, now, context, uncond, guidance_scale)
        kept.append(x)
    return torch.stack(kept, 1)


def ode_regression_loss(
    model: Callable[..., torch.Tensor],
    trajectories: torch.Tensor,
    context: torch.Tensor,
    mask: ChunkMask,
    *,
    steps: Sequence[float] = (1000, 750, 500, 250),
    shift: float = 5.0,
    teacher_forcing: bool = False,
    weight: torch.Tensor | None = None,
    generator: Generators = None,
) -> torch.Tensor:
    """Mean squared error of the clean clip that a chunk-causal student predicts from a teacher's x_t.

    Every chunk of every clip is at a step of its own, drawn uniformly from the student's. The whole clip is one
    chunk-causal pass.

    Args:
        model: the student, a `CausalWan`.
        trajectories: ``[B, len(steps) + 1, F, C, h, w]`` of `collect_trajectories`. context: ``[B, n, text_dim]``.
        mask: the chunks, sinks and window of the stream that the student is to run.
        steps, shift: as collected.
        teacher_forcing: noisy chunks see the clean past, as in streaming, instead of the noisy one.
        weight: ``[B]``. generator: of the steps, one or one for each clip.

    Returns:
        a scalar, float32 (float64).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.tensor("trajectories", trajectories, 6)
    times = FlowMatchSchedule(shift).timesteps(steps)
    sizes = dict(batch=None, states=len(times) + 1, frames=None, channels=None, height=None, width=None)
    checks.shape("trajectories", trajectories, **sizes)
    batch, _, frames = trajectories.shape[:3]
    lengths = torch.tensor(cut(mask.chunk_frames, mask.first_chunk_frames, frames))
    chunk = torch.arange(len(lengths)).repeat_interleave(lengths)
    uniform = draw(torch.rand, (batch, int(chunk[-1]) + 1), generator, "cpu", torch.float32)
    index = (uniform * len(times)).long()[:, chunk].to(trajectories.device)  # [B, F]
    noisy = trajectories[
        torch.arange(batch, device=index.device)[:, None], index, torch.arange(frames, device=index.device)
    ]
    clean, timesteps = trajectories[:, -1], torch.tensor(times, device=index.device)[index]
    forward = {"clean": clean} if teacher_forcing else {}
    return squared_error(predict_clean(model, noisy, timesteps, context, mask=mask, **forward), clean, weight)
