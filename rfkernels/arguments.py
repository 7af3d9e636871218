"""What the ops hand to a backend, in small tuples instead of a dozen loose arguments."""

from __future__ import annotations

from typing import NamedTuple

import torch


class CacheTensors(NamedTuple):
    """The tensors of a cache (``[L, B, tokens, H_kv, D]``) or of one of its layers (without L).

    k, v: ``(S + W) * T`` tokens, keys rotated at the frame number at which queries meet them.
    sink_k, sink_v: ``S * T`` tokens, the accumulators with un-rotated keys. None: the cache itself is the
    accumulator (values in the same dtype; keys when there is no rope), or the sink never changes.
    """

    k: torch.Tensor
    v: torch.Tensor
    sink_k: torch.Tensor | None
    sink_v: torch.Tensor | None


class Past(NamedTuple):
    """The frozen past of an open chunk: ``B * P`` frames ``[T, H_kv, D]``, those of sample 0 first.

    Of each sample the first ``valid_frames(num_frames) - F`` are real, in no particular order after the sinks; the
    others only fill up. keys are rotated.
    """

    k: list[torch.Tensor]
    v: list[torch.Tensor]
    num_frames: torch.Tensor  # int64 [B], the open frames included
    full: bool  # every sample has all P frames and all F open frames
    dtype: torch.dtype  # the cache's


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of softmax, rotation and accumulators for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def open_frames(num_frames: torch.Tensor, frames: int) -> torch.Tensor:
    """Frame numbers of the open chunk, int64 ``[B, frames]``; negative where a stream is younger than the chunk."""
    return num_frames[:, None] + torch.arange(-frames, 0, device=num_frames.device)
