"""What only the CUDA host implements: attention over given keys, forward and backward.

The order of the fields is written here and, for compiled code, in ``csrc/host/cuda/requests.h``; the operators
``torch.ops.rfkernels_cuda.*`` are private to this backend.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ...contract import namespaces
from ...contract.geometry import WindowMask
from ...contract.requests import Cotangents, RopeTables
from ...contract.schemas import arguments

Tensor = torch.Tensor
NO_MASK = WindowMask(0, 1, 1, 1, True)


class Keys(NamedTuple):
    """What queries meet: the open chunk's own keys (rotated) and its past, or a full sequence under ``mask``.

    k, v ``[B, N_k, H_kv, D]``: the past frames of a chunk, of which ``num_frames`` says how many are real, or the
    sequence. own_k, own_v: the chunk's own. capacity: frames of the cache. Of a sequence own_k, own_v and num_frames
    are None; of a chunk the mask is `NO_MASK`.
    """

    k: Tensor
    v: Tensor
    own_k: Tensor | None
    own_v: Tensor | None
    num_frames: Tensor | None
    frame_tokens: int
    capacity: int
    mask: WindowMask


class AttentionForward(NamedTuple):
    """Attention of un-rotated queries ``[B, N_q, H_q, D]``."""

    q: Tensor
    keys: Keys
    rope: RopeTables | None
    scale: float


class AttentionBackward(NamedTuple):
    """Its gradients in q, the keys and the values, un-rotated, in ``q_type``, ``k_type`` and ``v_type``.

    q: rotated; sink_q: rotated as sinks outside the window meet it.
    """

    cotangents: Cotangents
    q: Tensor
    sink_q: Tensor
    keys: Keys
    rope: RopeTables | None
    scale: float
    q_type: torch.dtype
    k_type: torch.dtype
    v_type: torch.dtype


OPERATIONS: dict[str, tuple[Any, str]] = {
    "attention_forward": (AttentionForward, "(Tensor out, Tensor lse)"),
    "attention_backward": (AttentionBackward, "(Tensor grad_q, Tensor grad_k, Tensor grad_v)"),
}


def define(namespace: str, kind: str = "DEF") -> torch.library.Library:
    """The schemas of `OPERATIONS`, for compiled code to implement."""
    library = torch.library.Library(namespace, kind)
    for name, (request, returns) in OPERATIONS.items():
        library.define(f"{name}({arguments(request)}) -> {returns}")
    return library


_library = define(namespaces.CUDA)
