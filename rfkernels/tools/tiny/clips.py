"""Clips for the small model: a camera moves over a photograph that comes with scikit-image, 32 x 32 RGB.

Every clip is a function of (seed, number). The camera frames the middle of the photograph; a pan begins anywhere on its
path. The photograph is mirrored at its edges for ever, so that a camera may move on for ever too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ... import checks

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket", "stereo_motorcycle")
MOTIONS = ("still", "pan left", "pan right", "pan up", "zoom", "turn")  # of the camera
SIZE = 32  # pixels
SPEEDS = (0.4, 3.2)  # pixels a frame, log-uniform
CONTEXT_DIM = 16
_WORLD = 128  # pixels of a photograph's shorter side: more than twice those of the frame that sees `_VIEW` of it
_VIEW = 0.75  # part of the photograph that is seen
_ASIDE = 0.1  # of the photograph's half width: how far its middle may lie from the centre, or from the path of a pan
_ZOOM, _TURN = 0.35, 0.6  # amplitudes of a swing: of the logarithm of that part, and in radians
_RADIUS = SIZE / 2 * 0.75  # pixels from the centre at which a turn or a zoom moves at the given speed


@dataclass(frozen=True)
class Condition:
    """What a clip shows, as the model is told: indices into `PHOTOS` and `MOTIONS`. The speed is left to chance."""

    photo: int
    motion: int

    def __post_init__(self) -> None:
        checks.integer("photo", self.photo, 0, len(PHOTOS) - 1)
        checks.integer("motion", self.motion, 0, len(MOTIONS) - 1)

    @property
    def name(self) -> str:
        return f"{PHOTOS[self.photo]}, {MOTIONS[self.motion]}"

    @classmethod
    def named(cls, photo: str, motion: str) -> Condition:
        """Raises:
        ValueError: an unknown name.
        """
        for argument, name, names in (("photo", photo, PHOTOS), ("motion", motion, MOTIONS)):
            if name not in names:
                raise ValueError(f"{argument} must be one of {list(names)}, got {name!r}")
        return cls(PHOTOS.index(photo), MOTIONS.index(motion))


def context(conditions: Sequence[Condition | None]) -> torch.Tensor:
    """Context tokens ``[B, 2, CONTEXT_DIM]``: a one-hot vector for the photograph, one for the motion.

    None stands for no condition: zeros.
    """
    tokens = torch.zeros(len(conditions), 2, CONTEXT_DIM)
    for row, condition in zip(tokens, conditions, strict=True):
        if condition is not None:
            row[0, condition.photo] = row[1, len(PHOTOS) + condition.motion] = 1
    return tokens


@functools.cache
def photograph(index: int) -> torch.Tensor:
    """``[3, _WORLD, _WORLD]`` in -1..1: the middle square.

    Raises:
        ImportError: no scikit-image.
    """
    from skimage import data

    image = getattr(data, PHOTOS[index])()
    image = torch.from_numpy(np.ascontiguousarray(image[0] if isinstance(image, tuple) else image)).permute(2, 0, 1)
    side = min(image.shape[1:])
    top, left = ((n - side) // 2 for n in image.shape[1:])
    square = image[None, :, top : top + side, left : left + side].float() / 127.5 - 1
    return F.interpolate(square, (_WORLD, _WORLD), mode="bilinear", antialias=True, align_corners=False)[0].clamp(-1, 1)


def camera(motion: str, speed: float, start: Sequence[float], frames: int) -> torch.Tensor:
    """Affine matrices ``[frames, 2, 3]`` in the photograph's -1..1: where the corners of each frame look.

    Args:
        speed: pixels of a frame by which the picture moves from frame to frame (at three quarters of the half width
            and in the middle of the swing, for a turn and a zoom).
        start: x and y of the centre, and the phase of the swing of a turn or zoom in radians.
    """
    x, y, phase = start
    time = torch.arange(frames, dtype=torch.float64)
    pixel = 2 * _VIEW / SIZE
    towards = {"pan left": (-1, 0), "pan right": (1, 0), "pan up": (0, -1)}.get(motion, (0, 0))
    amplitude = {"turn": _TURN, "zoom": _ZOOM}.get(motion, 0)
    swing = amplitude * torch.sin(phase + speed / (_RADIUS * amplitude) * time) if amplitude else 0 * time
    size, angle = (_VIEW, swing) if motion == "turn" else (_VIEW * swing.exp(), 0 * time)
    cos, sin = angle.cos(), angle.sin()
    rows = [size * cos, -size * sin, x + towards[0] * speed * pixel * time,
            size * sin, size * cos, y + towards[1] * speed * pixel * time]  # fmt: skip
    return torch.stack(rows, 1).reshape(frames, 2, 3)


def render(photo: int, cameras: torch.Tensor) -> torch.Tensor:
    """``[frames, 3, SIZE, SIZE]`` in -1..1, sampled twice as fine."""
    grid = F.affine_grid(cameras, [len(cameras), 3, 2 * SIZE, 2 * SIZE], align_corners=False).float()
    world = photograph(photo).expand(len(cameras), -1, -1, -1)
    return F.avg_pool2d(F.grid_sample(world, grid, padding_mode="reflection", align_corners=False), 2)


def clip(
    condition: Condition, frames: int, rng: np.random.Generator, speed: float | None = None
) -> tuple[torch.Tensor, float]:
    """A clip ``[frames, 3, SIZE, SIZE]`` in -1..1 and its speed in pixels a frame (0 where the camera is still)."""
    checks.integer("frames", frames, 1)
    x, y, phase, drawn = rng.uniform(size=4)
    low, high = SPEEDS
    speed = low * (high / low) ** drawn if speed is None else speed
    motion = MOTIONS[condition.motion]
    speed = 0.0 if motion == "still" else speed
    far_x, far_y = (1.0 if motion in pans else _ASIDE for pans in (("pan left", "pan right"), ("pan up",)))
    cameras = camera(motion, speed, (far_x * (2 * x - 1), far_y * (2 * y - 1), 2 * math.pi * phase), frames)
    return render(condition.photo, cameras), speed


def _random_condition(rng: np.random.Generator) -> Condition:
    return Condition(int(rng.integers(len(PHOTOS))), int(rng.integers(len(MOTIONS))))


def random_conditions(size: int, *key: int) -> list[Condition]:
    """Uniform ones; the same for the same key."""
    rng = np.random.default_rng(key)
    return [_random_condition(rng) for _ in range(size)]


def batch(size: int, frames: int, *key: int) -> tuple[torch.Tensor, list[Condition]]:
    """Clips ``[size, frames, 3, SIZE, SIZE]`` of random conditions; the same for the same key."""
    rng = np.random.default_rng(key)
    conditions = [_random_condition(rng) for _ in range(size)]
    return torch.stack([clip(condition, frames, rng)[0] for condition in conditions]), conditions
