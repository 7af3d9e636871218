"""Each operation as one request, which travels unchanged from the public function to the backend.

The order of the fields is written here and, for compiled code, in ``csrc/host/requests.h``; schemas, fakes and
gradients follow from it (``schemas.py``, ``ops.py``). Shapes: L layers, B samples, T tokens a frame, F frames of the
open chunk, S sink frames, W window frames, H_q query heads, H_kv key heads, D head size.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch

from .geometry import CacheGeometry, WindowMask

Tensor = torch.Tensor
Written = Annotated[torch.Tensor, "written"]  # a tensor that the operation changes in place


class RopeTables(NamedTuple):
    """What a kernel needs to rotate: see `Rope3D.tables`.

    frame_turns: float64 ``[frame_pairs]``, frequencies of the frame axis in turns (radians / 2 pi) per frame.
    spatial: ``[frame_tokens, row_pairs + column_pairs, 2]``, cos and sin of every token of a frame.
    half_split: pairs are (i, i + D/2) instead of (2i, 2i + 1).
    """

    frame_turns: Tensor
    spatial: Tensor
    half_split: bool

    @property
    def frame_tokens(self) -> int:
        return self.spatial.shape[0]


class CacheTensors(NamedTuple):
    """The tensors of a cache (``[L, B, tokens, H_kv, D]``) or of one of its layers (without L).

    k, v: ``(S + W) * T`` tokens, keys rotated at the frame number at which queries meet them.
    sink_k, sink_v: ``S * T`` tokens, the accumulators with un-rotated keys. None: the cache itself is the
    accumulator (values in the same dtype; keys when there is no rope), or the sink never changes.
    """

    k: Written
    v: Written
    sink_k: Written | None
    sink_v: Written | None


class BeginChunk(NamedTuple):
    """Fuses the frames that leave the window, oldest first, and moves the sinks' keys to their new position.

    cache: all layers. num_frames: int64 [B] *before* the new frames (the op does not advance it). advancing: bool [B],
    or None for all. decay: ``[2, H_kv]`` with alpha and 1 - alpha, or None for a static sink.
    """

    cache: CacheTensors
    num_frames: Tensor
    new_frames: int
    advancing: Tensor | None
    decay: Tensor | None
    rope: RopeTables | None
    geometry: CacheGeometry
    before_window: bool


class Write(NamedTuple):
    """Writes ``new_k, new_v [B, F * T, H_kv, D]`` into the open frames of one layer, replacing what they hold.

    num_frames: int64 [B], the open frames included.
    """

    cache: CacheTensors
    num_frames: Tensor
    new_k: Tensor
    new_v: Tensor
    rope: RopeTables | None
    geometry: CacheGeometry


class StreamingAttention(NamedTuple):
    """One pass over the open chunk: a `Write`, then q ``[B, F * T, H_q, D]`` over the valid prefix.

    full: every stream has filled its window and has all open frames, as the host knows it; only set for backends that
    ask for it (`backends.Choice.reads_full`), False otherwise.
    """

    q: Tensor
    write: Write
    scale: float
    full: bool
    return_lse: bool


class Past(NamedTuple):
    """The frozen past of an open chunk: rotated keys and values ``[B, P * T, H_kv, D]``, P = S + W - F frames.

    Of each sample the first ``valid_frames(num_frames) - F`` frames are real, sinks first; the others are zeros.
    num_frames: int64 [B], the open frames included. full: as in `StreamingAttention`, always set.
    """

    k: Tensor
    v: Tensor
    num_frames: Tensor
    full: bool


class ChunkAttention(NamedTuple):
    """What a pass gives for q, k, v of the open chunk, computed from its past without writing anything."""

    q: Tensor
    k: Tensor
    v: Tensor
    past: Past
    rope: RopeTables | None
    geometry: CacheGeometry
    scale: float


class WindowAttention(NamedTuple):
    """Full-sequence attention under ``mask``: q ``[B, N_q, H_q, D]`` holds the last N_q of the N_k positions."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: WindowMask
    rope: RopeTables | None
    scale: float


class Cotangents(NamedTuple):
    """What a backward pass adds to the request of the forward pass: its results, and the gradients that came in.

    out ``[B, N_q, H_q, D]``, lse ``[B, H_q, N_q]``.
    """

    grad_out: Tensor
    grad_lse: Tensor
    out: Tensor
    lse: Tensor


class ChunkGradients(NamedTuple):
    cotangents: Cotangents
    forward: ChunkAttention


class WindowGradients(NamedTuple):
    cotangents: Cotangents
    forward: WindowAttention


class Rotate(NamedTuple):
    """``x [B, N, H, D]`` rotated at frame numbers ``frames`` int64 ``[B or 1, entries]``, in ``dtype``.

    Each entry of ``frames`` serves ``N / entries`` consecutive tokens; the first token of x is token ``first_token`` of
    its frame. ``inverse`` undoes it. Compiled code only: no public op of its own.
    """

    x: Tensor
    frames: Tensor
    first_token: int
    rope: RopeTables
    inverse: bool
    dtype: torch.dtype


class MergeAttention(NamedTuple):
    """Joins two results over disjoint keys by their normalisers."""

    out1: Tensor
    lse1: Tensor
    out2: Tensor
    lse2: Tensor


class ReDMD(NamedTuple):
    """The Re-DMD loss of latents ``[B, ...]`` of one shape, and its gradient in x (paper, section 3.3).

    weight: ``[B]`` in float32 (float64). mask: bool of x's shape.
    """

    x: Tensor
    fake: Tensor
    real_cond: Tensor
    real_uncond: Tensor | None
    fake_uncond: Tensor | None
    weight: Tensor
    mask: Tensor | None
    guidance_scale: float
    fake_guidance_scale: float
    need_grad: bool


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of softmax, rotation and accumulators for tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def open_frames(num_frames: Tensor, frames: int) -> Tensor:
    """Frame numbers of the open chunk, int64 ``[B, frames]``; negative where a stream is younger than the chunk."""
    return num_frames[:, None] + torch.arange(-frames, 0, device=num_frames.device)
