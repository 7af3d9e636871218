"""Phases on the device: turns of a frame number, reduced in fixed point."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch

from rfkernels import Rope3D

triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")

from rfkernels.backends.triton.rotation import frame_phases  # noqa: E402
from rfkernels.backends.triton.structs import Rope  # noqa: E402


@triton.jit
def _phases(FRAMES, TURNS, OUT, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PAIRS: tl.constexpr):
    row, pair = tl.arange(0, ROWS), tl.arange(0, BLOCK_D // 2)
    sin, cos = frame_phases(tl.load(FRAMES + row)[:, None], Rope(TURNS, None, PAIRS, False), BLOCK_D)
    at = OUT + (row[:, None] * (BLOCK_D // 2) + pair[None, :]) * 2
    tl.store(at, sin)
    tl.store(at + 1, cos)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_phases_are_those_of_exact_arithmetic(dtype, device):
    """At any frame number, also a negative one (a query's, relative to sinks outside its window), and frequency."""
    turns = torch.cat([Rope3D(128).tables("cpu", torch.float32, 1).frame_turns[::4], torch.tensor([0.5, -0.3, 2.75])])
    turns = torch.cat([turns, torch.rand(13, dtype=torch.float64)])
    frames = torch.tensor([0, 1, 2, 3, -1, -7, -(10**6), 10**6, 2**31 - 1, -(2**31), 999_999, 77, 5, 6, 7, 8])
    out = torch.full((16, 32, 2), float("nan"), device=device)
    _phases[(1,)](frames.to(device, dtype), turns.to(device), out, 16, 64, 32)
    for row, frame in enumerate(frames.tolist()):
        for pair, turn in enumerate(turns.tolist()):
            angle = 2 * math.pi * float(frame * Fraction(turn) % 1)
            assert abs(out[row, pair, 0].item() - math.sin(angle)) < 1e-7, (frame, turn)
            assert abs(out[row, pair, 1].item() - math.cos(angle)) < 1e-7, (frame, turn)
