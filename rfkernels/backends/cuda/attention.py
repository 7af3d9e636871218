"""Contexts and full sequences, forward and backward: keys and queries are rotated in launches of their own, then one
launch attends, or three find the gradients.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ...contract.requests import (
    ChunkAttention,
    ChunkGradients,
    Cotangents,
    RopeTables,
    Rotate,
    WindowAttention,
    WindowGradients,
    open_frames,
)
from .. import reference
from ..layout import aligned_rows, unit_rows
from . import compiled
from .requests import NO_MASK, AttentionBackward, AttentionForward, Keys

Tensor = torch.Tensor


def readable_queries(q: Tensor) -> Tensor:
    """The kernels round queries to the type of the keys; float64 is rounded to float32 before."""
    return aligned_rows(q.float() if q.dtype == torch.float64 else q)


def _rotated(
    x: Tensor, rope: RopeTables | None, dtype: torch.dtype, frames: Callable[[], Tensor], first_token: int = 0
) -> Tensor:
    if rope is None:
        return aligned_rows(reference.store(x, dtype))
    return aligned_rows(compiled.rotate(Rotate(unit_rows(x), frames().contiguous(), first_token, rope, False, dtype)))


# --- the open chunk ---------------------------------------------------------------------------------------------------


def _chunk_rotated(x: Tensor, request: ChunkAttention) -> Tensor:
    count = request.q.shape[1] // request.geometry.frame_tokens
    past = request.past
    return _rotated(x, request.rope, past.k.dtype, lambda: open_frames(past.num_frames, count))


def _chunk_keys(request: ChunkAttention) -> Keys:
    """The past, and the own keys as the cache would hold them."""
    past, geometry = request.past, request.geometry
    own_k = _chunk_rotated(request.k, request)
    own_v = aligned_rows(reference.store(request.v, past.k.dtype))
    sizes = past.num_frames, geometry.frame_tokens, geometry.capacity
    return Keys(aligned_rows(past.k), aligned_rows(past.v), own_k, own_v, *sizes, NO_MASK)


def chunk_attention(request: ChunkAttention) -> tuple[Tensor, Tensor]:
    keys = _chunk_keys(request)
    return compiled.attention_forward(AttentionForward(readable_queries(request.q), keys, request.rope, request.scale))


def chunk_attention_backward(request: ChunkGradients) -> tuple[Tensor, Tensor, Tensor]:
    turned = _chunk_rotated(request.forward.q, request.forward)
    return _gradients(request, turned, turned, _chunk_keys(request.forward))


# --- full sequences ---------------------------------------------------------------------------------------------------


def _window_keys(request: WindowAttention) -> Keys:
    k, v, rope = request.k, request.v, request.rope
    tokens = 1 if rope is None else rope.frame_tokens
    k = _rotated(k, rope, v.dtype, lambda: torch.arange(k.shape[1], device=k.device)[None] // tokens)
    return Keys(k, aligned_rows(v), None, None, None, tokens, 0, request.mask)


def sink_window_attention(request: WindowAttention) -> tuple[Tensor, Tensor]:
    keys = _window_keys(request)
    return compiled.attention_forward(AttentionForward(readable_queries(request.q), keys, request.rope, request.scale))


def _window_queries(request: WindowAttention) -> tuple[Tensor, Tensor]:
    """The queries as keys of their window meet them, and as sinks outside it do."""
    q, k, dtype, rope = request.q, request.k, request.v.dtype, request.rope
    if rope is None:
        turned = aligned_rows(reference.store(q, dtype))
        return turned, turned
    tokens, first = rope.frame_tokens, k.shape[1] - q.shape[1]
    index = torch.arange(first, k.shape[1], device=q.device)[None]
    frames, evicted = index // tokens, request.mask.evicted_frames(index, tokens)
    turned = _rotated(q, rope, dtype, lambda: frames, first % tokens)
    return turned, _rotated(q, rope, dtype, lambda: frames - evicted, first % tokens)


def sink_window_attention_backward(request: WindowGradients) -> tuple[Tensor, Tensor, Tensor]:
    turned, sink_turned = _window_queries(request.forward)
    return _gradients(request, turned, sink_turned, _window_keys(request.forward))


# --- gradients --------------------------------------------------------------------------------------------------------


def _gradients(
    request: ChunkGradients | WindowGradients, turned: Tensor, sink_turned: Tensor, keys: Keys
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries are rotated in launches of their own: the backward reads them once for each tile of keys."""
    forward, given = request.forward, request.cotangents
    cotangents = Cotangents(aligned_rows(given.grad_out), given.grad_lse, aligned_rows(given.out), given.lse)
    inputs = forward.q, forward.k, forward.v
    types = (torch.float32 if x.dtype == torch.float64 else x.dtype for x in inputs)
    grads = compiled.attention_backward(
        AttentionBackward(cotangents, turned, sink_turned, keys, forward.rope, forward.scale, *types)
    )
    grad_q, grad_k, grad_v = (grad.to(x.dtype) for grad, x in zip(grads, inputs, strict=True))
    return grad_q, grad_k, grad_v
