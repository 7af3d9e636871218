"""What is measured of a video: motion, flicker, drift, fidelity to its condition; and the reward for motion.

Frames are ``[B, F, 3, SIZE, SIZE]`` in 0..1. The reward compares neighbouring pixels in time and space; the metric of
motion registers pictures by the phase of their Fourier transforms: neither is a function of the other.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from . import clips

_LIKE = 0.95  # of histograms: 98 % of real views are 0.98 like another one, at most 0.93 like another photograph


def grey(frames: torch.Tensor) -> torch.Tensor:
    return frames.mean(-3)


def decode(latents: torch.Tensor) -> torch.Tensor:
    """Latents of the small model, which are pixels in -1..1, as frames in 0..1."""
    return (latents.clamp(-1, 1) + 1) / 2


# --- the reward -------------------------------------------------------------------------------------------------------


def change(frames: torch.Tensor) -> torch.Tensor:
    """``[B]``: mean absolute difference of successive frames over that of neighbouring pixels, about pixels a frame."""
    light = grey(frames.float())
    along = light.diff(dim=-1).abs().mean((1, 2, 3)) + light.diff(dim=-2).abs().mean((1, 2, 3))
    return 2 * light.diff(dim=1).abs().mean((1, 2, 3)) / along.clamp(min=1e-3)


@functools.cache
def _usual_change(frames: int, samples: int = 48) -> list[tuple[float, float]]:
    """Mean and standard deviation of ``log change`` over real clips, for each of `clips.MOTIONS`."""
    found = []
    for motion in range(len(clips.MOTIONS)):
        rng = np.random.default_rng((7, motion))
        real = [clips.clip(clips.Condition(i % len(clips.PHOTOS), motion), frames, rng)[0] for i in range(samples)]
        value = change((torch.stack(real) + 1) / 2).clamp(min=1e-3).log()
        found.append((value.mean().item(), value.std().item()))
    return found


def reward(frames: torch.Tensor, conditions: Sequence[clips.Condition]) -> torch.Tensor:
    """``[B]``: how far log `change` lies above that of real clips of the same motion, in standard deviations, within
    -2..2. A still camera is not rewarded: 0."""
    usual = _usual_change(frames.shape[1])
    mean, deviation = torch.tensor([usual[c.motion] for c in conditions]).unbind(1)
    moving = torch.tensor([clips.MOTIONS[c.motion] != "still" for c in conditions])
    value = (change(frames).clamp(min=1e-3).log() - mean) / deviation.clamp(min=1e-3)
    return torch.where(moving, value.clamp(-2, 2), 0)


# --- metrics ----------------------------------------------------------------------------------------------------------


def displacement(frames: torch.Tensor) -> torch.Tensor:
    """``[B, F - 1]``: pixels by which a picture moves, registered by phase correlation.

    The median of its four corners (three quarters of the width), because a turn and a zoom move parts apart. Pictures
    that are mostly noise register at random: read it together with `sharpness` and `fidelity`.
    """
    from skimage.registration import phase_cross_correlation

    side, step = frames.shape[-1] * 3 // 4, frames.shape[-1] // 4
    window = torch.hann_window(side, periodic=False)
    corners = grey(frames.float()).unfold(2, side, step).unfold(3, side, step).flatten(2, 3)
    seen = ((corners - corners.mean((-1, -2), keepdim=True)) * window * window[:, None]).numpy()
    moved = np.zeros((*frames.shape[:1], frames.shape[1] - 1, seen.shape[2]))
    flat = seen.std((-1, -2)) < 1 / 255  # nothing to register, e.g. a picture that has gone black: no motion
    for b, f, i in np.ndindex(moved.shape):
        if flat[b, f, i] or flat[b, f + 1, i]:
            continue
        shift, *_ = phase_cross_correlation(seen[b, f, i], seen[b, f + 1, i], upsample_factor=10)
        moved[b, f, i] = np.hypot(*shift)
    return torch.from_numpy(np.median(moved, -1))


def flicker(frames: torch.Tensor) -> torch.Tensor:
    """``[B]``: mean absolute second difference in time of a frame's mean colour, which motion hardly changes."""
    return frames.float().mean((-1, -2)).diff(n=2, dim=1).abs().mean((1, 2))


def sharpness(frames: torch.Tensor) -> torch.Tensor:
    """``[B, F]``: log variance of the Laplacian of the grey picture."""
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]])[None, None]
    light = grey(frames.float())
    laplacian = F.conv2d(light.flatten(0, 1).unsqueeze(1), kernel).flatten(1)
    return (laplacian.var(1) + 1e-5).log().unflatten(0, light.shape[:2])


def drift(frames: torch.Tensor, segment: int) -> torch.Tensor:
    """``[B]``: standard deviation of the mean `sharpness` of the segments of a video."""
    values = sharpness(frames)
    whole = values[:, : values.shape[1] // segment * segment]
    return whole.unflatten(1, (-1, segment)).mean(2).std(1)


@functools.cache
def _gallery(photo: int, views: int = 160) -> torch.Tensor:
    """Colour histograms ``[views, bins]`` of real frames of a photograph."""
    rng = np.random.default_rng((11, photo))
    moving = [i for i, motion in enumerate(clips.MOTIONS) if motion in ("zoom", "turn", "pan up", "pan right")]
    real = [clips.clip(clips.Condition(photo, moving[i % 4]), 1, rng)[0] for i in range(views)]
    return histogram((torch.stack(real)[:, 0] + 1) / 2)


def histogram(frames: torch.Tensor, bins: int = 4) -> torch.Tensor:
    """``[N, bins ** 3]``: square roots of the shares of colours (unit vectors) of frames ``[N, 3, h, w]``."""
    level = (frames.float().clamp(0, 1) * bins).long().clamp(max=bins - 1)
    index = ((level[:, 0] * bins + level[:, 1]) * bins + level[:, 2]).flatten(1)
    counts = torch.zeros(len(frames), bins**3).scatter_add_(1, index, torch.ones(index.shape))
    return (counts / index.shape[1]).sqrt()


def fidelity(frames: torch.Tensor, photos: Sequence[int]) -> torch.Tensor:
    """``[B]``: share of frames that are of the photograph asked for.

    Such a frame's nearest colour histogram among real views is of that photograph, and it is as like as `_LIKE`: a
    picture that has gone black is of none.
    """
    found = histogram(frames.flatten(0, 1))
    likeness, nearest = torch.stack([(found @ _gallery(i).T).amax(1) for i in range(len(clips.PHOTOS))], 1).max(1)
    shown = torch.where(likeness >= _LIKE, nearest, -1)
    return (shown.unflatten(0, frames.shape[:2]) == torch.tensor(photos)[:, None]).float().mean(1)
