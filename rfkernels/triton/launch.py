"""What every launch needs: rotary arguments, tensors with a unit last stride, the device."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
import triton

from ..rope import RopeTables

FUSION = {"enable_fp_fusion": True}  # multiply-adds contract: Triton's default, written down
# ptxas spills a few registers where that fits one block more on an SM, unless it is told how many there are.
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}


class Rotary(NamedTuple):
    """Kernel arguments for a rope; without one, x stands in for the tables and nothing reads it."""

    turns: torch.Tensor
    spatial: torch.Tensor
    options: dict


def rotary(rope: RopeTables | None, x: torch.Tensor) -> Rotary:
    if rope is None:
        return Rotary(x, x, {"ROPE": False, "HALF": False, "FRAME_PAIRS": 0})
    options = {"ROPE": True, "HALF": rope.half_split, "FRAME_PAIRS": rope.frame_turns.shape[0]}
    return Rotary(rope.frame_turns, rope.spatial, options)


_FARTHEST_TOKENS = 2**24  # elements from token to token: a tile of 128 then stays within 2**31, its 32-bit offsets


def rows(x: torch.Tensor) -> torch.Tensor:
    """``x [B, N, H, D]``, copied where the last stride is not one or tokens lie too far apart for a tile's offsets.

    Kernels take any other stride; batch and head offsets, and those from tile to tile, have 64 bits.
    """
    return x if x.stride(-1) == 1 and x.stride(1) < _FARTHEST_TOKENS else x.contiguous()


def padded(head_dim: int) -> int:
    """Columns of a tile: a power of two."""
    return triton.next_power_of_2(head_dim)


def pointwise_rows(block_d: int) -> int:
    """Rows of a program of 4 warps that adds up or joins whole rows; 256 columns of 32 spill."""
    return 32 if block_d <= 128 else 16


def on_device(x: torch.Tensor):
    """Triton launches on the current device; an op may be called with tensors of another."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
