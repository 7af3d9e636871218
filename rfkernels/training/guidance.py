"""What a model makes of noisy clips: x0 at a timestep, with and without a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..losses.schedule import FlowMatchSchedule


def predict_clean(
    model: Callable[..., torch.Tensor], noisy: torch.Tensor, timesteps: torch.Tensor, context: Any, **forward: Any
) -> torch.Tensor:
    """x0 ``[B, F, C, h, w]`` of noisy clips whose flow the model predicts; timesteps ``[B]`` or ``[B, F]``."""
    return FlowMatchSchedule.clean(noisy, model(noisy, timesteps, context, **forward), timesteps)


def guided_flow(
    model: Callable[..., torch.Tensor],
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    uncond: torch.Tensor | None,
    guidance_scale: float,
) -> torch.Tensor:
    """``cond + g * (cond - uncond)``, as in the Re-DMD loss: g = 0 is no guidance."""
    flow = model(noisy, timesteps, context)
    if uncond is None or guidance_scale == 0:
        return flow
    return flow + guidance_scale * (flow - model(noisy, timesteps, uncond.expand(len(noisy), -1, -1)))
