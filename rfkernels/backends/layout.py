"""Copies of tensors that kernels cannot read as they are. What they can read is used in place, whatever its strides."""

from __future__ import annotations

import torch

FARTHEST_TOKENS = 2**24  # elements from token to token: a tile of 128 then stays within 2**31, its 32-bit offsets


def unit_rows(x: torch.Tensor) -> torch.Tensor:
    """x with a last stride of one."""
    return x if x.stride(-1) == 1 else x.contiguous()


def addressable(x: torch.Tensor) -> torch.Tensor:
    """``x [B, N, H, D]`` with a last stride of one and tokens that are not too far apart for a tile's offsets.

    Sample and head offsets, and those from tile to tile, have 64 bits.
    """
    return x if x.stride(-1) == 1 and x.stride(1) < FARTHEST_TOKENS else _copy(x)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """`addressable`, with rows that begin at multiples of 16 bytes."""
    item = x.element_size()
    if x.is_contiguous() and (x.shape[-1] | x.storage_offset()) * item % 16 == 0:
        return addressable(x)  # as nearly always
    whole = all(
        size <= 1 or stride * item % 16 == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )
    return addressable(x) if whole and x.storage_offset() * item % 16 == 0 else _copy(x)


def _copy(x: torch.Tensor) -> torch.Tensor:
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() gives x itself where sizes of 1 hide strides
