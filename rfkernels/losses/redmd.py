"""Re-DMD: distribution matching distillation weighted by a reward (arXiv 2512.04678)."""

from __future__ import annotations

import math

import torch

from .. import backends, checks, transforms
from ..contract import ops
from ..contract.requests import ReDMD, accumulate_dtype


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
    backend: str | None = None,
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
        guidance_scale: g of ``real``; fake_guidance_scale is the same for ``fake``, used where fake_uncond is given.
        mask: bool, broadcastable to x.
        backend: for this call; default as in `use_backend`.

    Returns:
        a scalar, float32 (float64 for float64 latents).

    Raises:
        ValueError, TypeError: naming the argument.

    Source: Re-DMD in "Reward Forcing" (arXiv 2512.04678, section 3.3).
    """
    request = ReDMD(
        x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale, need_grad=True
    )
    return _redmd(request, backend)[0]


def _redmd(request: ReDMD, backend: str | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Checks; the loss, and its gradient in x (empty where x wants none)."""
    x, weight, mask = request.x, request.weight, request.mask
    _check_x(x)
    latents = {name: getattr(request, name) for name in ("fake", "real_cond", "real_uncond", "fake_uncond")}
    for name, latent in latents.items():
        if latent is not None:
            checks.tensor(name, latent, device=x.device)
            if latent.shape != x.shape:
                raise ValueError(f"{name} must have x's shape {tuple(x.shape)}, got {tuple(latent.shape)}")
    checks.tensor("weight", weight, 1, x.device)
    checks.shape("weight", weight, batch=x.shape[0])
    request = request._replace(
        weight=weight.detach().to(accumulate_dtype(x.dtype)),
        mask=None if mask is None else checks.mask(mask, x),
        guidance_scale=float(request.guidance_scale),
        fake_guidance_scale=float(request.fake_guidance_scale),
        need_grad=torch.is_grad_enabled() and x.requires_grad,
        **{name: latent.detach() for name, latent in latents.items() if latent is not None},
    )
    backend = backends.choose("redmd_loss", x.device, x.dtype, None, backend).backend
    if not transforms.active(x):
        return ops.redmd_loss(request, backend)
    loss, grad = transforms.run("redmd_loss", request._replace(need_grad=True), backend, x.device)
    # Its derivative is by definition the gradient that it returns, which also forward mode then finds.
    return loss.detach() + (grad.detach() * (x - x.detach())).sum().to(loss.dtype), grad


def _check_x(x: torch.Tensor) -> None:
    checks.tensor("x", x)
    if x.dim() < 2:
        raise ValueError(f"x must have a batch and at least one more dimension, got shape {tuple(x.shape)}")


def reward_weights(reward: torch.Tensor, beta: float, max_weight: float | None = None) -> torch.Tensor:
    """``min(exp(beta * reward), max_weight)`` of ``[B]`` rewards, in float32 (float64), without gradient.

    Raises:
        ValueError, TypeError: a reward that is not a floating-point tensor ``[B]``.

    Source: Re-DMD in "Reward Forcing" (arXiv 2512.04678, section 3.3); the paper's beta is the inverse of this one.
    """
    checks.tensor("reward", reward, 1)
    weight = (beta * reward.detach().to(accumulate_dtype(reward.dtype))).exp()
    return weight if max_weight is None else weight.clamp(max=max_weight)


def effective_sample_size(weight: torch.Tensor) -> torch.Tensor:
    """``(sum w)**2 / sum w**2`` of weights ``[B]``: a scalar tensor in their dtype.

    From 1 (one sample has all the weight) to B (all have the same); nan if all are 0.
    """
    return weight.sum().square() / weight.square().sum()


class ReDMDLoss(torch.nn.Module):
    """Re-DMD loss: the DMD gradient of each sample times ``exp(beta * reward)``.

    Args:
        beta: inverse temperature of the reward (2 as published; the paper's beta is its inverse). 0 is plain DMD.
        guidance_scale: g of classifier-free guidance on the real score.
        fake_guidance_scale: the same for the fake score, used where ``fake_uncond`` is given.
        max_weight: weights are clipped to it.
        normalize: divide the weights by their mean over the batch, so that a good batch takes no larger step than a bad
            one. A batch of one sample is then plain DMD.

    Where the student already matches the teacher the expected gradient is 0 for every beta: the weight tilts a student
    that cannot hold all modes, it does not converge to ``q * exp(beta * reward)``.

    Raises:
        ValueError: a beta or guidance scale that is not finite, a max_weight that is not positive.

    Source: "Reward Forcing" (arXiv 2512.04678, section 3.3).
    """

    def __init__(
        self,
        beta: float = 2.0,
        guidance_scale: float = 3.0,
        fake_guidance_scale: float = 0.0,
        max_weight: float | None = None,
        normalize: bool = False,
    ):
        super().__init__()
        scales = {"beta": beta, "guidance_scale": guidance_scale, "fake_guidance_scale": fake_guidance_scale}
        for name, value in scales.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} must be finite, got {value}")
        if max_weight is not None and not max_weight > 0:
            raise ValueError(f"max_weight must be positive, got {max_weight}")
        self.beta, self.guidance_scale, self.fake_guidance_scale = beta, guidance_scale, fake_guidance_scale
        self.max_weight, self.normalize = max_weight, normalize

    def forward(
        self,
        x: torch.Tensor,
        fake: torch.Tensor,
        real_cond: torch.Tensor,
        real_uncond: torch.Tensor | None,
        reward: torch.Tensor,
        mask: torch.Tensor | None = None,
        fake_uncond: torch.Tensor | None = None,
        sample_weight: torch.Tensor | None = None,
        return_metrics: bool = False,
        backend: str | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss, and with ``return_metrics`` a dict of tensors on the device (nothing is read by the host).

        Arguments that are not listed are those of `redmd_loss`.

        Args:
            reward: ``[B]``, finite, on x's device; never differentiated. Checked on the CPU (but not by a compiled
                loss); on another device the host would have to wait for it, so there a nan or infinity reaches the
                loss and the gradient: check the gradient's norm, as `ReDMDTrainer` does.
            sample_weight: ``[B]``, multiplies the weights of the reward.

        Returns:
            loss, a scalar in float32 (float64); metrics ``weight`` ``[B]`` as it was used, ``effective_sample_size``
            of it, and ``gradient_norm`` ``[B]``, the norm of the loss's gradient in each sample (where x wants one).

        Raises:
            ValueError, TypeError: naming the argument.
        """
        _check_x(x)
        checks.tensor("reward", reward, 1, x.device)
        checks.shape("reward", reward, batch=len(x))
        if reward.device.type == "cpu" and not torch.compiler.is_compiling() and not reward.isfinite().all():
            raise ValueError(f"reward must be finite, got {reward.tolist()}")
        precision = accumulate_dtype(x.dtype)
        weight = reward_weights(reward.to(precision), self.beta, self.max_weight)
        if self.normalize:
            weight = weight / weight.mean()
        if sample_weight is not None:
            checks.tensor("sample_weight", sample_weight, 1, weight.device)
            checks.shape("sample_weight", sample_weight, batch=len(weight))
            weight = weight * sample_weight.detach()
        request = ReDMD(
            x, fake, real_cond, real_uncond, fake_uncond, weight, mask, self.guidance_scale, self.fake_guidance_scale,
            need_grad=True,
        )  # fmt: skip
        loss, grad = _redmd(request, backend)
        if not return_metrics:
            return loss
        metrics = {"weight": weight, "effective_sample_size": effective_sample_size(weight)}
        if grad.numel():
            metrics["gradient_norm"] = torch.linalg.vector_norm(grad.flatten(1), dim=1, dtype=precision)
        return loss, metrics
