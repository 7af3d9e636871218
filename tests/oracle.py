"""Numbers to compare with: float64 by the reference, and the error that plain torch makes in the same dtype.

``backend`` is the name of the one that is tested; where it runs is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import budget
import torch

import rfkernels as rf
from rfkernels.backends import library


def runs(backend: str, dtype: torch.dtype) -> tuple[tuple[str, torch.dtype], ...]:
    """What a result is made of: the backend's, plain torch's in the same dtype, and the exact one."""
    return (backend, dtype), ("reference", dtype), ("reference", torch.float64)


def check(
    name: str,
    got: torch.Tensor,
    plain: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    cancelled: float = 0.0,
) -> None:
    """Error of ``got`` against float64 at most twice that of plain torch, plus one rounding band of ``dtype``."""
    assert got.shape == exact.shape, f"{name}: {tuple(got.shape)} instead of {tuple(exact.shape)}"
    budget.check(got, exact, plain, name, least=1e-3, dtype=dtype, cancelled=cancelled)


def uneven(*size: int, dtype: torch.dtype, device: torch.device, spare: int = 16) -> torch.Tensor:
    """Random values in a view that is not contiguous (unit last stride, NaN around it)."""
    *front, heads, last = size
    full = torch.full((*front, heads + 1, last + spare), float("nan"), dtype=torch.float32)
    full[..., :heads, :last] = torch.randn(size)
    return full.to(device, dtype)[..., :heads, :last]


SPARES = (16, 32, 48)  # columns behind a row of q, k and v: each has strides of its own

COMPARED = ("out", "lse", "grad_q", "grad_k", "grad_v")


def cancelled_sums(
    out: torch.Tensor, lse: torch.Tensor, grads: list[torch.Tensor], inputs: list[torch.Tensor]
) -> dict[str, float]:
    """How large that is, in the gradients, which cancels where a row sees one key. grads: of out and lse.

    A kernel forms two differences of sums of D products, each rounded to float32 in an order that is its own or its
    matrix library's: ``grad_out . v - delta`` with ``delta = grad_out . out``, and ``score - lse``. Where a row sees
    one key both are zero, and plain torch, which forms each pair from one product, gets exactly that: its error there
    gives no budget. A kernel's differences are exact to float32 of *their sums*. An error of delta acts as one of the
    normaliser's gradient does; an error of score - lse scales all that the row contributes. So the gradients of each
    row's terms, weighted by the magnitude of its sums, are what float32's eps counts for.
    """
    grad_out, grad_lse = grads
    lse = torch.where(lse.isfinite(), lse, 0)
    (key,) = torch.autograd.grad(lse.sum(), inputs[:1], retain_graph=True)  # scale times the average key of each row
    score = (inputs[0] * key).abs().sum(-1).detach()
    delta = (grad_out * out).abs().sum(-1).transpose(1, 2).detach()
    contributed = (score * (grad_out * out).sum(-1)).sum() + (score.transpose(1, 2) * grad_lse * lse).sum()
    found = [torch.zeros_like(x) for x in inputs]
    for terms in ((lse * delta).sum(), contributed):
        for total, x in zip(
            found, torch.autograd.grad(terms, inputs, retain_graph=True, allow_unused=True), strict=True
        ):
            total += 0 if x is None else x.abs()
    return {f"grad_{name}": x.max().item() if x.numel() else 0.0 for name, x in zip("qkv", found, strict=True)}


def compare(backend: str, function: Callable, qkv: list[torch.Tensor], dtype: torch.dtype) -> None:
    """``function(run, q, k, v) -> out, lse``: both, and all gradients through both, in the three `runs`."""
    results, weights, cancelled = [], None, {}
    for run, (name, run_dtype) in enumerate(runs(backend, dtype)):
        inputs = [x.detach().to(run_dtype).requires_grad_() for x in qkv]
        with rf.use_backend(name):
            out, lse = function(run, *inputs)
        if weights is None:
            weights = [torch.randn(x.shape).to(x.device) for x in (out, lse)]
        if run_dtype == torch.float64:
            cancelled = cancelled_sums(out, lse, [w.to(out.dtype) for w in weights], inputs)
        loss = (out * weights[0].to(out.dtype)).sum()
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * weights[1].to(lse.dtype)).sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    for name, *triple in zip(COMPARED, *results, strict=True):
        check(name, *triple, dtype, cancelled.get(name, 0.0))


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
        """NaN into every entry of the cache that no frame has reached; not where a library may read whole tiles."""
        if self.device.type != "cpu" and self.backend in library.BACKENDS:
            return
        for _, cache, _ in self.runs():
            tokens = cache.frame_tokens
            for sample, age in enumerate(cache.ages):
                for x in (cache.k, cache.v):
                    x[:, sample, cache._geometry.valid_frames(age) * tokens :] = float("nan")

    def inputs(self, heads: int) -> list[torch.Tensor]:
        cache = self.ours
        tokens = cache.open_frames * cache.frame_tokens
        return [
            uneven(cache.batch_size, tokens, h, cache.head_dim, dtype=self.dtype, device=self.device, spare=spare)
            for h, spare in zip((heads, cache.num_kv_heads, cache.num_kv_heads), SPARES, strict=True)
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

    def compare_cache(self, truncated: bool = False) -> None:
        """truncated: what runs the kernels does not round to the nearest."""
        for name in ("k", "v", "sink_k", "sink_v"):
            triple = [getattr(cache, name) for cache in (self.ours, self.plain, self.exact)]
            if triple[0] is None:
                continue
            band = triple[0].dtype
            if self.dtype != torch.float32 and name == "sink_k":
                band = self.dtype  # folds keys that the cache holds rounded after their rotation
            check(name, *triple, band)
            if self.exact is not self.plain and not truncated:
                budget.check_unbiased(triple[0], triple[2], name, band)
