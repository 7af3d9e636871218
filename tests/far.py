"""Cases, for every backend, whose entries lie more than 2**31 elements apart: offsets that 32 bits do not hold."""

from __future__ import annotations

import oracle
import pytest
import torch

import rfkernels as rf
from rfkernels.cache import CacheLayer
from rfkernels.contract.requests import CacheTensors

STRIDE = 2**30 + 16  # fits 32 bits; twice it does not

# (batch, tokens, heads), which of them is far apart, and how far
SIZES = [
    pytest.param((3, 6, 1), 0, STRIDE, id="samples"),
    pytest.param((1, 6, 3), 2, STRIDE, id="heads"),
    pytest.param((1, 6, 1), 1, STRIDE, id="tokens_farther_apart_than_a_tile_may_reach"),
    pytest.param((1, 144, 1), 1, 2**24 - 16, id="tokens_just_within_reach"),
]


def far(x: torch.Tensor, dim: int, stride: int = STRIDE) -> torch.Tensor:
    """x in a view of that stride along ``dim``; the memory in between is reserved, never touched."""
    strides = list(x.contiguous().stride())
    strides[dim] = stride
    reach = sum((size - 1) * step for size, step in zip(x.shape, strides, strict=True)) + 1
    assert reach > 2**31
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        storage = torch.empty(reach, dtype=x.dtype, device=x.device)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        pytest.skip(f"cannot reserve {reach * x.element_size() / 2**30:.1f} GiB: {str(error).splitlines()[0]}")
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filling
    return storage.as_strided(x.shape, strides).copy_(x)


def run_life(backend: str, device: torch.device, dtype: torch.dtype, dim: int, head_dim: int) -> None:
    """A stream whose cache is far apart along a dimension of [layers, batch, tokens, heads, head_dim]."""
    sizes = [1, 1, None, 1]
    sizes[dim] = 3
    streams = oracle.Streams(
        backend, device, dtype, rf.Rope3D(head_dim, 2, 2), num_layers=sizes[0], batch_size=sizes[1],
        num_kv_heads=sizes[3], frame_tokens=4, sink_frames=1, window_frames=2, alpha=0.5,
    )  # fmt: skip
    cache = streams.ours
    cache._tensors = CacheTensors(*(far(x, dim) for x in cache._tensors))
    cache.k, cache.v = cache._tensors[:2]
    cache._layers = [CacheLayer(cache, layer) for layer in range(cache.num_layers)]
    for _ in range(4):
        streams.begin(1)
        for layer in range(cache.num_layers):
            streams.write(layer)
    streams.begin(1)
    streams.run_pass(cache.num_layers - 1)
    streams.compare_cache()


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    window = 5 if k.shape[1] < 140 else 140  # so that one tile of queries sees two of 128 keys
    return rf.sink_window_attention(q, k, v, sink_tokens=2, window_tokens=window, return_lse=True)


def run_attention(backend: str, device: torch.device, dtype: torch.dtype, size, dim: int, stride: int, head_dim: int):
    """Forward and backward against the reference, which reads the same views."""
    qkv = [far(torch.randn(*size, head_dim, device=device).to(dtype), dim, stride) for _ in range(3)]
    oracle.compare(backend, lambda _, q, k, v: attend(q, k, v), qkv, dtype)


def run_incoming(backend: str, device: torch.device, dtype: torch.dtype, size, dim: int, stride: int, head_dim: int):
    """Gradients that come in for the output, and for its normaliser ``[B, H, N]``."""
    qkv = [torch.randn(*size, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3)]
    incoming = [torch.randn(*size, head_dim, device=device).to(dtype), torch.randn(*size, device=device)]
    with rf.use_backend(backend):
        results = attend(*qkv)
        placed = [far(x, dim, stride) for x in incoming]
        expected, got = (
            torch.autograd.grad(results, qkv, [out, lse.transpose(1, 2)], retain_graph=True)
            for out, lse in (incoming, placed)
        )
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
