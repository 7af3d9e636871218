"""Numbers to compare with: float64 by the reference, and the error that plain torch makes in the same dtype.

``backend`` is the name of the one that is tested; where it runs is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import budget
import torch

import rfkernels as rf


def runs(backend: str, dtype: torch.dtype) -> tuple[tuple[str, torch.dtype], ...]:
    """What a result is made of: the backend's, plain torch's in the same dtype, and the exact one."""
    return (backend, dtype), ("reference", dtype), ("reference", torch.float64)


def check(name: str, got: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    """Error of ``got`` against float64 at most twice that of plain torch, plus one rounding band of ``dtype``."""
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} instead of {tuple(exact.shape)}"
    budget.check(got, exact, plain, name, least=1e-3, dtype=dtype)


def uneven(*size: int, dtype: torch.dtype, device: torch.device, spare: int = 16) -> torch.Tensor:
    """Random values in a view that is not contiguous (unit last stride, NaN around it)."""
    *front, heads, last = size
    full = torch.full((*front, heads + 1, last + spare), float("nan"), dtype=torch.float32)
    full[..., :heads, :last] = torch.randn(size)
    return full.to(device, dtype)[..., :heads, :last]


COMPARED = ("out", "lse", "grad_q", "grad_k", "grad_v")


def compare(backend: str, function: Callable, qkv: list[torch.Tensor], dtype: torch.dtype) -> None:
    """``function(run, q, k, v) -> out, lse``: both, and all gradients through both, in the three `runs`."""
    results, weights = [], None
    for run, (name, run_dtype) in enumerate(runs(backend, dtype)):
        inputs = [x.detach().to(run_dtype).requires_grad_() for x in qkv]
        with rf.use_backend(name):
            out, lse = function(run, *inputs)
        if weights is None:
            weights = [torch.randn(x.shape).to(x.device) for x in (out, lse)]
        loss = (out * weights[0].to(out.dtype)).sum()
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * weights[1].to(lse.dtype)).sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    for name, *triple in zip(COMPARED, *results, strict=True):
        check(name, *triple, dtype)


class Streams:
    """One cache under the backend, and the same life under the reference in its dtype and in float64."""

    def __init__(self, backend: str, device: torch.device, dtype: torch.dtype, rope: rf.Rope3D | None, **arguments):
        sink_dtype = arguments.pop("sink_dtype", None)
        common = dict(head_dim=rope.head_dim if rope else 32, rope=rope, device=device) | arguments
        self.backend, self.dtype, self.device = backend, dtype, device
        self.ours, self.plain = (rf.EMASinkCache(**common, dtype=dtype, sink_dtype=sink_dtype) for _ in range(2))
        # With a half sink the published rounding is the definition: nothing in float64 to compare with.
        self.exact = self.plain if sink_dtype else rf.EMASinkCache(**common, dtype=torch.float64)

    def runs(self) -> Iterator[tuple[str, rf.EMASinkCache, torch.dtype]]:
        caches = (self.ours, self.plain) if self.exact is self.plain else (self.ours, self.plain, self.exact)
        for (name, dtype), cache in zip(runs(self.backend, self.dtype), caches, strict=False):
            yield name, cache, dtype

    def begin(self, *arguments, **options) -> None:
        for name, cache, _ in self.runs():
            with rf.use_backend(name):
                cache.begin_chunk(*arguments, **options)

    def poison(self) -> None:
        """NaN into every entry of the cache that no frame has reached."""
        for _, cache, _ in self.runs():
            tokens = cache.frame_tokens
            for sample, age in enumerate(cache.ages):
                for x in (cache.k, cache.v):
                    x[:, sample, cache._geometry.valid_frames(age) * tokens :] = float("nan")

    def inputs(self, heads: int) -> list[torch.Tensor]:
        cache = self.ours
        tokens = cache.open_frames * cache.frame_tokens
        return [
            uneven(cache.batch_size, tokens, h, cache.head_dim, dtype=self.dtype, device=self.device)
            for h in (heads, cache.num_kv_heads, cache.num_kv_heads)
        ]

    def run_pass(self, layer: int = 0, group: int = 1) -> None:
        """Writes and attends, and compares output and normaliser."""
        qkv = self.inputs(group * self.ours.num_kv_heads)
        results = []
        for name, cache, dtype in self.runs():
            with rf.use_backend(name):
                results.append(rf.streaming_attention(*(x.to(dtype) for x in qkv), cache[layer], return_lse=True))
        results += [results[-1]] * (3 - len(results))
        for name, *triple in zip(("out", "lse"), *results, strict=True):
            check(name, *triple, self.dtype)

    def write(self, layer: int = 0) -> None:
        _, k, v = self.inputs(1)
        for name, cache, dtype in self.runs():
            with rf.use_backend(name):
                cache[layer].write(k.to(dtype), v.to(dtype))

    def compare_cache(self) -> None:
        for name in ("k", "v", "sink_k", "sink_v"):
            triple = [getattr(cache, name) for cache in (self.ours, self.plain, self.exact)]
            if triple[0] is None:
                continue
            band = triple[0].dtype
            if self.dtype != torch.float32 and name == "sink_k":
                band = self.dtype  # folds keys that the cache holds rounded after their rotation
            check(name, *triple, band)
