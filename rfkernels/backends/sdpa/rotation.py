"""Rotation in few launches: two real tables, a product, a swap of each pair and a multiply-add."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ...contract.requests import RopeTables
from .. import reference


class Turn(NamedTuple):
    """The factors of tokens: ``x * cos + swapped(x) * sin``, where `swapped` exchanges the two elements of each pair.

    cos, sin: ``[B or 1, N, 1, D]`` in float32 (float64), sin negative for the first element of a pair.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    half_split: bool


def turn_of(
    frames: torch.Tensor, rope: RopeTables, tokens: int, *, first_token: int = 0, inverse: bool = False
) -> Turn:
    """The factors of ``tokens`` consecutive tokens; frames, first_token and inverse as in `reference.rotate`."""
    entries, precision = frames.shape[1], rope.spatial.dtype
    each = tokens // entries
    turns = frames[..., None] * rope.frame_turns  # float64
    angles = (2 * math.pi * (turns - turns.round()))[:, :, None].expand(-1, -1, each, -1)
    spatial = rope.spatial
    if first_token != 0 or each != rope.frame_tokens:
        position = (torch.arange(tokens, device=frames.device) + first_token) % rope.frame_tokens
        spatial = spatial[position].unflatten(0, (entries, each))
    spatial = spatial.expand(*angles.shape[:3], -1, -1)
    cos = torch.cat([angles.cos().to(precision), spatial[..., 0]], -1)
    sin = torch.cat([angles.sin().to(precision), spatial[..., 1]], -1)
    first, second = (sin, -sin) if inverse else (-sin, sin)
    axis = -2 if rope.half_split else -1
    cos, sin = (torch.stack(pair, axis).flatten(-2).flatten(1, 2)[:, :, None] for pair in ((cos, cos), (first, second)))
    return Turn(cos, sin, rope.half_split)


def turned(x: torch.Tensor, turn: Turn | None, dtype: torch.dtype) -> torch.Tensor:
    """``x [..., B, N, H, D]`` rotated and rounded to ``dtype`` (as `reference.store` does); None: rounded only."""
    if turn is None:
        return reference.store(x, dtype)
    if x.dtype == torch.float64:  # as the definition: in the tables' precision
        x = x.to(turn.cos.dtype)
    pairs, axis = ((2, -1), -2) if turn.half_split else ((-1, 2), -1)
    swapped = x.unflatten(-1, pairs).flip(axis).flatten(-2)
    product = x * turn.cos
    if dtype == product.dtype:
        return product.addcmul_(swapped, turn.sin)
    out = torch.empty_like(product, dtype=dtype)
    torch.addcmul(product, swapped, turn.sin, out=out)
    if dtype == torch.float16:  # a rotation may grow by sqrt(2)
        limit = torch.finfo(dtype).max
        out.clamp_(-limit, limit)
    return out
