"""What a chunk costs, exactly and without a GPU: ``python -m benchmarks.counter``.

A dispatch mode sees every operator that torch dispatches. An rfkernels op is opaque to it, so `BelowOps` calls the op's
body under the mode: what is counted is what the backend does. Fake CUDA tensors (shapes without data) take the place of
a device, so that the code path is a device's and the paper's shape needs no memory. Counted are

- operators that launch work (views and allocations are not), a fused kernel of ours as the one launch that it is;
- bytes read and written: of every operator the distinct elements of the tensors it is given and the tensors it makes or
  changes, as if each were moved once. For our kernels, which read only the part of the cache that they need, the least
  bytes of `cases`, labelled computed;
- reads of a device's value by the host;
- peak temporary memory: bytes of storages that were made and are still alive, at their highest.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rfkernels as rf
from rfkernels import backends, native, ops
from rfkernels.backends.sdpa import dense

from . import usual
from .cases import CASES, Stream

# The host waits for the device: it reads a value, or the size of a result depends on values.
HOST_READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2")
# Memory is taken, and nothing is computed.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "lift_fresh")


class BelowOps(TorchDispatchMode):
    """Runs the bodies of rfkernels ops where the mode sees what they call; `other` gets every other operator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "prim":  # a question about a tensor
            return func(*args, **kwargs)
        with self:
            if func.namespace == "rfkernels":
                return ops.BODIES[func._schema.name.split("::")[1]](*args, **kwargs)
            # Below autograd composite operators arrive whole; kernels are what they are made of.
            result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self.other(func, args, kwargs)

    def other(self, func, args, kwargs):
        return func(*args, **kwargs)


@dataclass
class Counts:
    operators: Counter = field(default_factory=Counter)
    read: int = 0
    written: int = 0
    host_reads: int = 0
    peak: int = 0

    @property
    def launches(self) -> int:
        return sum(self.operators.values())


def distinct_bytes(x: torch.Tensor) -> int:
    """Of the elements of a tensor that are not the same memory: expanded dimensions count once."""
    if x.numel() == 0:
        return 0
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride)
    return math.prod(sizes) * x.element_size()


class CountingMode(BelowOps):
    """Counts into ``counts`` while it is active."""

    def __init__(self):
        super().__init__()
        self.counts = Counts()
        self._alive: dict[StorageWeakRef, int] = {}

    def other(self, func, args, kwargs):
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        name = func._schema.name.split("::")[1]
        before = {StorageWeakRef(x.untyped_storage()) for x in given}
        self._sweep()
        if given and not any(isinstance(x, FakeTensor) for x in given):
            with unset_fake_temporarily():  # a length, which is real so that the host can read it
                result = func(*args, **kwargs)
        else:
            result = func(*args, **kwargs)
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        for x in made:
            storage = StorageWeakRef(x.untyped_storage())
            if storage not in before:
                self._alive[storage] = x.untyped_storage().nbytes()
        self.counts.peak = max(self.counts.peak, sum(self._alive.values()))
        if name.removesuffix(".default") in HOST_READS or self._by_mask(name, args):
            self.counts.host_reads += 1
        elif not (func.is_view or name in ALLOCATIONS or name == "_unsafe_view"):
            self._count(func, name, args, kwargs, given, made, before)
        return result

    @staticmethod
    def _by_mask(name: str, args: tuple) -> bool:
        """Indexing by a mask: the host has to know how many elements there are."""
        return name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )

    def _count(self, func, name, args, kwargs, given, made, before):
        self.counts.operators[name] += 1
        arguments = zip(func._schema.arguments, args, strict=False)
        changed = [x for schema, x in arguments if schema.is_write and isinstance(x, torch.Tensor)]
        changed += [x for key, x in kwargs.items() if key == "out" and isinstance(x, torch.Tensor)]
        overwritten = changed if name in ("copy_", "fill_", "zero_", "index_put_") or "out" in kwargs else []
        if name == "index_put_":  # only the elements that are chosen
            changed = [kwargs.get("values", args[2] if len(args) > 2 else None)]
        if name in ("index", "index_select", "gather"):  # reads of its source what it returns
            overwritten = [args[0]]
            self.counts.read += sum(distinct_bytes(x) for x in made)
        self.counts.read += sum(distinct_bytes(x) for x in given if not any(x is y for y in overwritten))
        new = [x for x in made if StorageWeakRef(x.untyped_storage()) not in before]
        self.counts.written += sum(distinct_bytes(x) for x in [*changed, *new])

    def _sweep(self):
        for storage in [storage for storage in self._alive if storage.expired()]:
            del self._alive[storage]


# --- a chunk of the usual procedure, and of ours ----------------------------------------------------------------------


@contextlib.contextmanager
def as_a_device() -> Iterator[None]:
    """CPU tensors take the code path of other devices: what a small shape with data is checked by."""

    def no(x: torch.Tensor) -> bool:  # a Mock would keep every tensor that it is asked about
        return False

    with mock.patch.object(native, "serves", no), mock.patch.object(dense, "on_cpu", no):
        yield


def _inputs(case: Stream, device: str) -> list[torch.Tensor]:
    heads = (case.heads, case.kv_heads, case.kv_heads)
    return [torch.zeros(1, case.queries, h, case.head_dim, dtype=case.dtype, device=device) for h in heads]


def usual_chunk(case: Stream, device: str) -> Callable[[], object]:
    """All layers and passes of a chunk that evicts, on a full window."""
    rope = rf.Rope3D(case.head_dim, case.rows, case.columns)
    phases = usual.phases(rope, case.sink + case.window, device)
    with unset_fake_temporarily():
        lengths = [[torch.tensor([case.keys]) for _ in range(2)] for _ in range(case.layers)]
    caches = []
    for filled, seen in lengths:
        cache = usual.UsualCache(
            case.kv_heads, case.head_dim, case.frame_tokens, case.sink, case.window, phases, case.alpha, case.dtype,
            device,
        )  # fmt: skip
        cache.filled, cache.seen = filled, seen
        caches.append(cache)
    q, k, v = _inputs(case, device)

    def call():
        for _ in range(case.passes):
            for cache in caches:
                cache.attend(q, k, v, case.keys)

    return call


def our_chunk(case: Stream, device: str, backend: str = "sdpa") -> Callable[[], object]:
    cache = rf.EMASinkCache(
        num_layers=case.layers, batch_size=1, num_kv_heads=case.kv_heads, head_dim=case.head_dim,
        frame_tokens=case.frame_tokens, sink_frames=case.sink, window_frames=case.window, alpha=case.alpha,
        rope=rf.Rope3D(case.head_dim, case.rows, case.columns), dtype=case.dtype, device=device,
    )  # fmt: skip
    with _everywhere(backend):
        for _ in range(-(-(case.sink + case.window) // case.frames)):
            cache.begin_chunk(case.frames, backend=backend)
    q, k, v = _inputs(case, device)
    layers = list(cache)

    def call():
        with _everywhere(backend):
            cache.begin_chunk(case.frames, backend=backend)
            for _ in range(case.passes):
                for layer in layers:
                    rf.streaming_attention(q, k, v, layer, backend=backend)

    return call


@contextlib.contextmanager
def _everywhere(name: str) -> Iterator[None]:
    """The backend is available whatever devices there are."""
    anywhere = mock.patch.object(backends.module(name), "unavailable", lambda device: None)
    with anywhere, mock.patch.object(backends, "_choices", {}):
        yield


def one_kernel(q, k, v, attn_mask=None, *, scale=None, enable_gqa=False):
    """scaled_dot_product_attention as the one fused kernel that it is on a device; without one torch takes it apart."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=attn_mask, scale=scale)[0]


def count(make: Callable[[Stream, str], Callable[[], object]], case: Stream, device: str = "cuda") -> Counts:
    """The counts of the chunk that ``make(case, device)`` makes; on "cuda" with fake tensors."""
    fake = FakeTensorMode() if device == "cuda" else contextlib.nullcontext()
    fused = mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", one_kernel)
    with torch.no_grad(), fused, as_a_device(), fake:
        call = make(case, device)
        with CountingMode() as mode:
            call()
    return mode.counts


def count_triton(case: Stream, backend: str = "triton") -> tuple[Counts, Counter]:
    """The same by the triton backend as on an H100: torch's operators, and its launches, noted and not run.

    backend: another one that launches its kernels.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from rfkernels.backends.triton import tiles

    launches: Counter = Counter()

    def note(self, *args, **kwargs):
        launches[self.fn.__name__] += 1

    no_device = mock.patch.object(torch.cuda, "device", contextlib.nullcontext)
    h100 = mock.patch.multiple(tiles, architecture=lambda: 90, processors=lambda device: 132)
    no_driver = mock.patch.object(driver, "_active", mock.Mock())
    with mock.patch.object(JITFunction, "run", note), no_device, no_driver, h100:
        counts = count(lambda case, device: our_chunk(case, device, backend), case)
    return counts, launches


@dataclass
class Row:
    """One procedure of the table. computed: its bytes follow from the sizes, and are not counted."""

    launches: int
    read: float
    written: float
    host_reads: int
    peak: int
    computed: bool = False


def rows(case: Stream) -> dict[str, Row]:
    """The procedures side by side, for a chunk of ``case``."""

    def row(counts: Counts) -> Row:
        return Row(counts.launches, counts.read, counts.written, counts.host_reads, counts.peak)

    found = {"usual": row(count(usual_chunk, case)), "ours, torch operations": row(count(our_chunk, case))}
    counts, launches = count_triton(case)
    work = case.chunk()
    outputs = case.passes * case.layers * case.queries * (case.heads + 2 * case.kv_heads) * case.head_dim
    sinks = case.layers * case.sink * case.frame_tokens * case.kv_heads * case.head_dim * 2
    written = outputs * case.dtype.itemsize + sinks * (4 + case.dtype.itemsize)
    found["ours, Triton"] = Row(
        counts.launches + launches.total(), work.bytes - written + counts.read, written + counts.written,
        counts.host_reads, counts.peak, computed=True,
    )  # fmt: skip
    return found


def markdown(case: Stream) -> str:
    found = rows(case)
    lines = ["| a chunk | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name, show in {
        "kernels launched": lambda r: f"{r.launches}",
        "read, GB": lambda r: f"{r.read / 1e9:.1f}" + " (computed)" * r.computed,
        "written, GB": lambda r: f"{r.written / 1e9:.1f}" + " (computed)" * r.computed,
        "host reads of a device value": lambda r: f"{r.host_reads}",
        "peak temporary memory, MB": lambda r: f"{r.peak / 1e6:.1f}",
    }.items():
        lines.append(f"| {name} | " + " | ".join(show(row) for row in found.values()) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(CASES["paper"]))
