"""The reference as a backend: its own functions forward, autograd through them backward."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .. import reference
from ..arguments import Past

begin_chunk = reference.begin_chunk
write = reference.write
redmd_loss = reference.redmd_loss
sink_window_attention = reference.sink_window_attention
chunk_attention = reference.chunk_attention


def streaming_attention(q, new_k, new_v, cache, num_frames, rope, geometry, scale, full, return_lse):
    reference.write(cache, num_frames, new_k, new_v, rope, geometry)
    return reference.attend(q, cache.k, cache.v, num_frames, rope, geometry, scale)


def chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, past: Past, rope, geometry, scale):
    return _differentiate(
        lambda *qkv: reference.chunk_attention(*qkv, past, rope, geometry, scale),
        (q, k, v),
        (grad_out, grad_lse),
    )


def sink_window_attention_backward(grad_out, grad_lse, q, k, v, out, lse, rope, mask, scale):
    return _differentiate(
        lambda *qkv: reference.sink_window_attention(*qkv, rope, mask, scale), (q, k, v), (grad_out, grad_lse)
    )


# An op's body runs below autograd; the dispatch keys excluded there are put back to differentiate inside it.
_OUTSIDE = torch._C._dispatch_tls_local_exclude_set()


def _differentiate(
    function: Callable, inputs: tuple[torch.Tensor, ...], grads: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, _OUTSIDE), torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() for x in inputs)
        found = torch.autograd.grad(function(*inputs), inputs, grads)
    return tuple(grad.clone(memory_format=torch.contiguous_format) for grad in found)  # not views of one buffer
