"""Flow matching: the straight path between a clean latent and noise, and the shifted schedule of noise levels on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch

from .. import checks
from ..draws import Generators, draw

Step = TypeVar("Step", float, torch.Tensor)


class FlowMatchSchedule:
    """``x_t = (1 - sigma) x0 + sigma eps`` with flow ``v = eps - x0`` and ``sigma = shift s / (1 + (shift - 1) s)``.

    s = step / 1000 is the position on the unshifted schedule; the model is given the timestep ``t = 1000 sigma``. The
    steps (1000, 750, 500, 250) with shift 5 give t = 1000, 937.5, 833.3, 625 ("Reward Forcing", arXiv 2512.04678).

    Args:
        shift: > 0; 1 leaves the schedule linear.

    Raises:
        ValueError: a shift that is not positive.
    """

    def __init__(self, shift: float = 5.0):
        if not checks.is_real(shift) or not shift > 0:
            raise ValueError(f"shift must be a positive number, got {shift!r}")
        self.shift = float(shift)

    def timestep(self, step: Step) -> Step:
        """The timestep t in 0..1000 of an unshifted step in 0..1000."""
        s = step / 1000
        return 1000 * self.shift * s / (1 + (self.shift - 1) * s)

    def timesteps(self, steps: Sequence[float]) -> tuple[float, ...]:
        """The timesteps of a step list.

        Raises:
            ValueError: no steps, not falling, or outside (0, 1000].
        """
        steps = tuple(float(s) for s in steps)
        if not steps or any(not 0 < s <= 1000 for s in steps) or any(a <= b for a, b in itertools.pairwise(steps)):
            raise ValueError(f"steps must fall strictly within (0, 1000], got {steps}")
        return tuple(self.timestep(s) for s in steps)

    def random_timesteps(
        self,
        size: int | Sequence[int],
        bounds: tuple[float, float] = (20.0, 980.0),
        generator: Generators = None,
        device: torch.device | str | None = None,
    ) -> torch.Tensor:
        """Timesteps of training samples, float32: uniform on the unshifted schedule, shifted, clamped to ``bounds``.

        Args:
            size: B, one for each clip, or (B, ...).
            bounds: within 0..1000; as published 2-98 %.
            generator: one, or one for each clip.

        Raises:
            ValueError: bounds that are not two rising numbers within 0..1000.
        """
        low, high = bounds
        if not 0 <= low <= high <= 1000:
            raise ValueError(f"bounds must be two rising numbers in [0, 1000], got {bounds}")
        sizes = tuple(size) if isinstance(size, Iterable) else (size,)
        device = torch.get_default_device() if device is None else device
        uniform = draw(torch.rand, sizes, generator, device, torch.float32)
        return self.timestep(1000 * uniform).clamp(low, high)

    @staticmethod
    def add_noise(clean: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """x_t: ``clean`` and ``noise`` ``[B, F, ...]`` mixed at a timestep: a number, ``[B]`` or ``[B, F]``."""
        sigma = _sigma(timestep, clean)
        return ((1 - sigma) * clean + sigma * noise).to(clean.dtype)

    @staticmethod
    def clean(noisy: torch.Tensor, flow: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """x0 = x_t - sigma v, ``[B, F, ...]``; timesteps as in `add_noise`."""
        return (noisy - _sigma(timestep, noisy) * flow).to(noisy.dtype)

    @staticmethod
    def flow(noisy: torch.Tensor, clean: torch.Tensor, timestep: torch.Tensor | float) -> torch.Tensor:
        """v = (x_t - x0) / sigma, ``[B, F, ...]``, for sigma > 0; timesteps as in `add_noise`."""
        return ((noisy - clean) / _sigma(timestep, noisy)).to(noisy.dtype)


def _sigma(timestep: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor | float:
    """timestep / 1000, to be broadcast over ``like``; float32 at least."""
    if not isinstance(timestep, torch.Tensor):
        return timestep / 1000
    sigma = timestep.to(like.device, torch.promote_types(like.dtype, torch.float32)) / 1000
    return sigma.reshape(sigma.shape + (1,) * (like.dim() - sigma.dim()))
