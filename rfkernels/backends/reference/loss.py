"""The Re-DMD loss and its gradient (arXiv 2512.04678, section 3.3)."""

from __future__ import annotations

import torch

from ...contract.requests import ReDMD, accumulate_dtype


def redmd_loss(request: ReDMD) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and its gradient in x in x's dtype (empty unless need_grad)."""
    x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale, need_grad = request
    precision = accumulate_dtype(x.dtype)
    per_sample = (-1,) + (1,) * (x.dim() - 1)

    def guided(cond: torch.Tensor, uncond: torch.Tensor | None, scale: float) -> torch.Tensor:
        cond = cond.to(precision)
        return cond if uncond is None else cond + scale * (cond - uncond.to(precision))

    real = guided(real_cond, real_uncond, guidance_scale)
    norm = (x.to(precision) - real).abs().flatten(1).mean(1).view(per_sample)
    grad = (guided(fake, fake_uncond, fake_guidance_scale) - real) / norm
    grad = torch.where(grad.isfinite(), grad, 0)
    if mask is not None:
        grad = grad * mask
    count = torch.full((), x.numel(), device=x.device) if mask is None else mask.sum()
    weight = weight / count.clamp(min=1)
    loss = 0.5 * (weight * grad.square().flatten(1).sum(1)).sum()
    return loss, (weight.view(per_sample) * grad).to(x.dtype) if need_grad else x.new_empty(0)
