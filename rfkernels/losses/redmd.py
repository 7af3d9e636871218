"""Re-DMD: distribution matching distillation weighted by a reward (arXiv 2512.04678)."""

from __future__ import annotations

import torch

from .. import backends, checks
from ..arguments import accumulate_dtype


def redmd_loss(
    x: torch.Tensor,
    fake: torch.Tensor,
    real_cond: torch.Tensor,
    real_uncond: torch.Tensor | None,
    weight: torch.Tensor,
    *,
    guidance_scale: float = 3.0,
    fake_uncond: torch.Tensor | None = None,
    fake_guidance_scale: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The Re-DMD loss with given weights, fused: two passes over memory, at most two latents of extra memory.

    With ``real = real_cond + g * (real_cond - real_uncond)``, ``norm_b = mean |x - real|`` over the whole sample and
    ``grad = (fake - real) / norm`` (non-finite entries set to 0), M the number of selected elements: the loss is
    ``sum_b 0.5 * w_b * sum_mask grad**2 / max(1, M)`` and its gradient in x ``w_b * grad / max(1, M)`` inside the mask.
    Differentiable in x only.

    Args:
        x: the generated clean latent ``[B, ...]``, e.g. ``[B, F, C, h, w]``.
        fake, real_cond, real_uncond, fake_uncond: predictions of x0, of x's shape; the unconditional ones may be None
            (no guidance).
        weight: ``[B]``, w_b, e.g. ``exp(beta * reward)``.
        mask: bool, broadcastable to x.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have a batch and at least one more dimension, got shape {tuple(x.shape)}")
    latents = {"fake": fake, "real_cond": real_cond, "real_uncond": real_uncond, "fake_uncond": fake_uncond}
    for name, latent in latents.items():
        if latent is not None:
            checks.tensor(name, latent, device=x.device)
            if latent.shape != x.shape:
                raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(latent.shape)}")
    checks.tensor("weight", weight, 1, x.device)
    checks.shape("weight", weight, batch=x.shape[0])
    if mask is not None:
        mask = checks.mask(mask, x)
    need_grad = torch.is_grad_enabled() and x.requires_grad
    loss, _ = torch.ops.rfkernels.redmd_loss(
        x, *(None if latent is None else latent.detach() for latent in latents.values()),
        weight.detach().to(accumulate_dtype(x.dtype)), mask, float(guidance_scale), float(fake_guidance_scale),
        need_grad, backends.resolve(x.device, x.dtype),
    )  # fmt: skip
    return loss


class ReDMDLoss(torch.nn.Module):
    """Re-DMD loss: the DMD gradient of each sample times ``exp(beta * reward)``.

    Args:
        beta: inverse temperature of the reward (2 as published; the paper's beta is its inverse). 0 is plain DMD.
        guidance_scale: g of classifier-free guidance on the real score.
        fake_guidance_scale: the same for the fake score, used where ``fake_uncond`` is given.

    Where the student already matches the teacher the expected gradient is 0 for every beta: the weight tilts a student
    that cannot hold all modes, it does not converge to ``q * exp(beta * reward)``.
    """

    def __init__(self, beta: float = 2.0, guidance_scale: float = 3.0, fake_guidance_scale: float = 0.0):
        super().__init__()
        self.beta, self.guidance_scale, self.fake_guidance_scale = beta, guidance_scale, fake_guidance_scale

    def forward(
        self,
        x: torch.Tensor,
        fake: torch.Tensor,
        real_cond: torch.Tensor,
        real_uncond: torch.Tensor | None,
        reward: torch.Tensor,
        mask: torch.Tensor | None = None,
        fake_uncond: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """reward: ``[B]``, never differentiated; the rest as in `redmd_loss`."""
        checks.tensor("reward", reward, 1)
        return redmd_loss(
            x,
            fake,
            real_cond,
            real_uncond,
            (self.beta * reward.detach().to(accumulate_dtype(x.dtype))).exp(),
            guidance_scale=self.guidance_scale,
            fake_uncond=fake_uncond,
            fake_guidance_scale=self.fake_guidance_scale,
            mask=mask,
        )
