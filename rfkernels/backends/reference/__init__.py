"""The definitions, in plain PyTorch: any device, any floating dtype, differentiable, no value read by the host.

Slow and short on purpose: what a kernel should compute is what these files compute (docs/semantics.md in code). Shapes:
B batch, N tokens, H heads (H_q query heads, H_kv key heads, H_q = G * H_kv), D head size, T tokens a frame, F frames of
the open chunk. Source: "Reward Forcing" (arXiv 2512.04678), EMA-Sink and Re-DMD; rotating once, when written, is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...contract.requests import ChunkGradients, Cotangents, WindowGradients
from .attention import (
    chunk_attention,
    dense_attention,
    merge_attention,
    sink_window_attention,
    streaming_attention,
)
from .cache import begin_chunk, fold, write
from .loss import redmd_loss
from .rotation import rotate, store

__all__ = [
    "begin_chunk",
    "chunk_attention",
    "chunk_attention_backward",
    "dense_attention",
    "fold",
    "merge_attention",
    "redmd_loss",
    "rotate",
    "sink_window_attention",
    "sink_window_attention_backward",
    "store",
    "streaming_attention",
    "unavailable",
    "unsupported",
    "write",
]


def unavailable(device: torch.device) -> str | None:
    return None


def unsupported(operation: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    return None


def chunk_attention_backward(request: ChunkGradients) -> tuple[torch.Tensor, ...]:
    return _differentiate(chunk_attention, request)


def sink_window_attention_backward(request: WindowGradients) -> tuple[torch.Tensor, ...]:
    return _differentiate(sink_window_attention, request)


# An op's body runs below autograd; the dispatch keys excluded there are put back to differentiate inside it.
_OUTSIDE = torch._C._dispatch_tls_local_exclude_set()


def _differentiate(
    function: Callable[[Any], tuple[torch.Tensor, torch.Tensor]], request: ChunkGradients | WindowGradients
) -> tuple[torch.Tensor, ...]:
    """Gradients of the forward function in q, k and v, by autograd."""
    cotangents: Cotangents = request.cotangents
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, _OUTSIDE), torch.enable_grad():
        forward = request.forward
        q, k, v = (x.detach().requires_grad_() for x in (forward.q, forward.k, forward.v))
        results = function(forward._replace(q=q, k=k, v=v))
        found = torch.autograd.grad(results, (q, k, v), (cotangents.grad_out, cotangents.grad_lse))
    return tuple(grad.clone(memory_format=torch.contiguous_format) for grad in found)  # not views of one buffer
