"""What a model makes of noisy clips: x0 at a timestep, with and without a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..losses.schedule import FlowMatchSchedule


def predict_clean(
    model: Callable[..., torch.Tensor], noisy: torch.Tensor, timesteps: torch.Tensor, context: Any, **forward: Any
) -> torch.Tensor:
    """The clean clips ``x0 = x_t - sigma * model(x_t, t, context)`` of a model that predicts the flow.

    Args:
        model: ``model(noisy, timesteps, context, **forward)`` gives the flow, e.g. a `CausalWan`.
        noisy: x_t, ``[B, F, C, h, w]``.
        timesteps: in 0..1000, ``[B]`` or ``[B, F]``.
        context: what the model takes.

    Returns:
        x0, ``[B, F, C, h, w]`` in the flow's dtype. Errors are the model's.
    """
    return FlowMatchSchedule.clean(noisy, model(noisy, timesteps, context, **forward), timesteps)


def guided_flow(
    model: Callable[..., torch.Tensor],
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor,
    uncond: torch.Tensor | None,
    guidance_scale: float,
) -> torch.Tensor:
    """The flow under classifier-free guidance, ``cond + g * (cond - uncond)``, as in the Re-DMD loss: g = 0 is none.

    Args:
        model: predicts the flow, e.g. a `CausalWan` without mask.
        noisy: x_t, ``[B, F, C, h, w]``.
        timesteps: in 0..1000, ``[B]`` or ``[B, F]``.
        context: text embeddings ``[B, n, text_dim]``.
        uncond: those of the negative prompt, ``[1 or B, n, text_dim]``; None: no guidance.
        guidance_scale: g.

    Returns:
        ``[B, F, C, h, w]``. Errors are the model's.
    """
    flow = model(noisy, timesteps, context)
    if uncond is None or guidance_scale == 0:
        return flow
    return flow + guidance_scale * (flow - model(noisy, timesteps, uncond.expand(len(noisy), -1, -1)))
