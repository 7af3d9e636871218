"""Numbers to compare with: float64 by the reference, and the error that plain torch makes in the same dtype."""

from __future__ import annotations

import budget
import torch

import rfkernels as rf


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


class Streams:
    """One cache under the Triton backend, and the same life under the reference in its dtype and in float64."""

    def __init__(self, device: torch.device, dtype: torch.dtype, rope: rf.Rope3D | None, **arguments):
        sink_dtype = arguments.pop("sink_dtype", None)
        common = dict(head_dim=rope.head_dim if rope else 32, rope=rope, device=device) | arguments
        self.dtype = dtype
        self.ours, self.plain = (rf.EMASinkCache(**common, dtype=dtype, sink_dtype=sink_dtype) for _ in range(2))
        # With a half sink the published rounding is the definition: nothing in float64 to compare with.
        self.exact = self.plain if sink_dtype else rf.EMASinkCache(**common, dtype=torch.float64)
        self.device = device

    def runs(self):
        yield "triton", self.ours, self.dtype
        yield "reference", self.plain, self.dtype
        if self.exact is not self.plain:
            yield "reference", self.exact, torch.float64

    def begin(self, *arguments, **options) -> None:
        for backend, cache, _ in self.runs():
            with rf.use_backend(backend):
                cache.begin_chunk(*arguments, **options)

    def poison(self) -> None:
        """NaN into every entry of the cache that no frame has reached."""
        for _, cache, _ in self.runs():
            tokens = cache.geometry.frame_tokens
            for sample, age in enumerate(cache.ages):
                for x in (cache.k, cache.v):
                    x[:, sample, cache.geometry.valid_frames(age) * tokens :] = float("nan")

    def inputs(self, heads: int) -> list[torch.Tensor]:
        cache = self.ours
        tokens = cache.open_frames * cache.geometry.frame_tokens
        return [
            uneven(cache.batch_size, tokens, h, cache.head_dim, dtype=self.dtype, device=self.device)
            for h in (heads, cache.num_kv_heads, cache.num_kv_heads)
        ]

    def run_pass(self, layer: int = 0, group: int = 1) -> None:
        """Writes and attends, and compares output and normaliser."""
        qkv = self.inputs(group * self.ours.num_kv_heads)
        results = []
        for backend, cache, dtype in self.runs():
            with rf.use_backend(backend):
                results.append(rf.streaming_attention(*(x.to(dtype) for x in qkv), cache[layer], return_lse=True))
        results += [results[-1]] * (3 - len(results))
        for name, *triple in zip(("out", "lse"), *results, strict=True):
            check(
                name,
                *triple,
                self.dtype if name == "out" else torch.float32 if self.dtype == torch.float32 else self.dtype,
            )

    def write(self, layer: int = 0) -> None:
        _, k, v = self.inputs(1)
        for backend, cache, dtype in self.runs():
            with rf.use_backend(backend):
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
