"""Rotation, and rounding to the dtype in which a result is kept."""

from __future__ import annotations

import math

import torch

from ...contract.requests import RopeTables


def store(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to ``dtype``; float16 saturates at its largest finite value, since a rotation may grow by sqrt(2)."""
    if dtype == torch.float16 and x.dtype != torch.float16:
        limit = torch.finfo(torch.float16).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def rotate(
    x: torch.Tensor,
    frames: torch.Tensor,
    rope: RopeTables | None,
    *,
    first_token: int = 0,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rotates ``x [..., B, N, H, D]`` at frame numbers ``frames`` int64 ``[B or 1, entries]``; ``inverse`` undoes it.

    Each entry of ``frames`` serves ``N / entries`` consecutive tokens; the first token of ``x`` is token
    ``first_token`` of its frame. Angles are reduced in turns in float64, the rest is float32 (float64 for float64).
    """
    dtype = dtype or x.dtype
    if rope is None:
        return store(x, dtype)
    tokens, precision = x.shape[-3], rope.spatial.dtype
    turns = frames.to(torch.float64)[..., None] * rope.frame_turns
    angles = (2 * math.pi * (turns - turns.round())).repeat_interleave(tokens // frames.shape[1], 1)
    position = (torch.arange(tokens, device=x.device) + first_token) % rope.frame_tokens
    spatial = rope.spatial[position].expand(angles.shape[0], -1, -1, -1)
    cos = torch.cat([angles.cos().to(precision), spatial[..., 0]], -1)[:, :, None]
    sin = torch.cat([angles.sin().to(precision), spatial[..., 1]], -1)[:, :, None]
    if inverse:
        sin = -sin
    x = x.to(precision)
    a, b = x.chunk(2, -1) if rope.half_split else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    return store(torch.cat(turned, -1) if rope.half_split else torch.stack(turned, -1).flatten(-2), dtype)
