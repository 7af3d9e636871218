"""Flow matching: how the teacher and the critic (the fake score) learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import checks
from ..contract.requests import accumulate_dtype
from ..draws import Generators, draw
from .schedule import FlowMatchSchedule


def flow_matching_loss(
    model: Callable[..., torch.Tensor],
    clean: torch.Tensor,
    context: Any,
    timesteps: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    *,
    shift: float = 5.0,
    weight: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    generator: Generators = None,
    **forward: Any,
) -> torch.Tensor:
    """The mean squared error of the flow that a model predicts on its own noised samples.

    With ``x_t = (1 - sigma) x0 + sigma eps`` and M the number of selected elements (all, if no mask) the loss is
    ``sum_b w_b sum_mask (model(x_t, t) - (eps - x0))**2 / max(1, M)``. The clean samples get no gradient.

    Args:
        model: ``model(x_t, timesteps, context, **forward)`` gives the flow, e.g. a `CausalWan`.
        clean: x0, ``[B, F, C, h, w]``.
        timesteps: in 0..1000, ``[B]`` or ``[B, F]``; default one for each clip, `FlowMatchSchedule.random_timesteps`
            with ``shift``.
        noise: eps, of clean's shape; default standard normal.
        weight: w_b, ``[B]``, default 1.
        mask: bool, broadcastable to clean.
        generator: of what is drawn, one or one for each sample.

    Returns:
        a scalar, float32 (float64 for float64 samples).

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.tensor("clean", clean)
    if clean.dim() < 2:
        raise ValueError(f"clean must have a batch and at least one more dimension, got shape {tuple(clean.shape)}")
    clean, precision = clean.detach(), accumulate_dtype(clean.dtype)
    if timesteps is None:
        timesteps = FlowMatchSchedule(shift).random_timesteps(len(clean), generator=generator, device=clean.device)
    elif timesteps.shape not in (clean.shape[:1], clean.shape[:2]):
        raise ValueError(f"timesteps must be {list(clean.shape[:1])} or {list(clean.shape[:2])}, got {timesteps.shape}")
    if noise is None:
        noise = draw(torch.randn, clean.shape, generator, clean.device, clean.dtype)
    elif noise.shape != clean.shape:
        raise ValueError(f"noise must have clean's shape {tuple(clean.shape)}, got {tuple(noise.shape)}")
    flow = model(FlowMatchSchedule.add_noise(clean, noise, timesteps), timesteps, context, **forward)
    return squared_error(flow, noise.to(precision) - clean, weight, mask)


def critic_loss(
    critic: Callable[..., torch.Tensor],
    generated: torch.Tensor,
    context: Any,
    timesteps: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The loss that trains the critic (the fake score of DMD) on the student's samples: `flow_matching_loss` on them.

    The student gets no gradient. Timesteps by default as published: uniform for each clip, shifted, clamped to 2-98 %.

    Args:
        critic: ``critic(x_t, timesteps, context)`` gives the flow, e.g. a `CausalWan`.
        generated: the student's clean clips ``[B, F, C, h, w]``.
        context: what the critic takes, e.g. text embeddings ``[B, n, text_dim]``.
        timesteps, noise: as in `flow_matching_loss`.
        options: its other arguments: shift, weight, mask, generator, and those of the critic.

    Returns:
        a scalar, float32 (float64 for float64 samples).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: DMD's fake score, as in "Reward Forcing" (arXiv 2512.04678).
    """
    return flow_matching_loss(critic, generated, context, timesteps, noise, **options)


def squared_error(
    got: torch.Tensor, wanted: torch.Tensor, weight: torch.Tensor | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """``sum_b w_b sum_mask (got - wanted)**2 / max(1, M)``, in float32 (float64)."""
    error = (got.to(accumulate_dtype(got.dtype)) - wanted).square()
    if weight is not None:
        checks.tensor("weight", weight, 1, got.device)
        checks.shape("weight", weight, batch=len(got))
        error = error * weight.detach().reshape(-1, *[1] * (got.dim() - 1))
    if mask is None:
        return error.mean()
    mask = checks.mask(mask, got)
    return torch.where(mask, error, 0).sum() / mask.sum().clamp(min=1)
