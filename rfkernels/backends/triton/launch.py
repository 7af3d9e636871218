"""What every launch needs: structs made of tensors, tensors with a unit last stride, the device."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton.language as tl

from ...contract.geometry import WindowMask
from ...contract.requests import RopeTables
from ..layout import addressable as addressable  # for the modules that launch
from .structs import NO_LAYERS, KeyValues, Mask, Rope, Strided

FUSION = {"enable_fp_fusion": True}  # multiply-adds contract: Triton's default, written down
# ptxas spills a few registers where that fits one block more on an SM, unless it is told how many there are.
ALL_REGISTERS = {} if torch.version.hip else {"maxnreg": 255}
_AS_IT_IS = contextlib.nullcontext()


def strided(x: torch.Tensor) -> Strided:
    """``x [B, N, H, D]``, or ``[L, B, N, H, D]``, as a kernel's argument."""
    strides = x.stride()
    if len(strides) == 4:  # several times for each layer of a pass
        sample, token, head, _ = strides
        return Strided(x, sample, token, head, NO_LAYERS)
    layer, sample, token, head, _ = strides
    return Strided(x, sample, token, head, layer)


def key_values(k: torch.Tensor, v: torch.Tensor) -> KeyValues:
    return KeyValues(strided(k), strided(v))


def rope_of(rope: RopeTables | None) -> Rope | None:
    if rope is None:
        return None
    return Rope(rope.frame_turns, rope.spatial, *_constants(rope.frame_turns.shape[0], rope.half_split))


@functools.cache
def _constants(*values: int) -> tuple[tl.constexpr, ...]:
    return tuple(tl.constexpr(value) for value in values)


def mask_of(mask: WindowMask | None) -> Mask | None:
    return None if mask is None else Mask(*mask[:4], tl.constexpr(mask.own_chunk))


def padded(head_dim: int) -> int:
    """Columns of a tile: a power of two. (Triton's own function costs the host several microseconds.)"""
    return 1 << (head_dim - 1).bit_length()


def pointwise_rows(block_d: int) -> int:
    """Rows of a program of 4 warps that adds up or joins whole rows; 256 columns of 32 spill."""
    return 32 if block_d <= 128 else 16


def on_device(x: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device; an op may be called with tensors of another."""
    return torch.cuda.device(x.device) if x.is_cuda else _AS_IT_IS
