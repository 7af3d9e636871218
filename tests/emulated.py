"""The Triton backend on CPU tensors by what its compiler makes: each launch's PTX, executed by the emulator.

The backend's own launch code runs unchanged, so tile choice, argument specialisation and grid are those of a GPU of
that architecture. Outputs are poisoned, and every byte of them must be written.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import triton
from patched import serving
from ptx import emulator
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

# Kernels without machine code are kept apart: Triton 3.6 would take them for those of a GPU of that architecture.
CACHE = Path(__file__).parents[1] / "build" / "triton_emulated"

# What a launch must write completely. The cache's kernels, which write parts of a tensor, are checked by their results.
OUTPUTS = {
    "rotate_kernel": ["OUT"],
    "forward_kernel": ["OUT", "LSE"],
    "merge_kernel": ["OUT", "LSE"],
    "delta_kernel": ["DELTA"],
    "grad_q_kernel": ["GRAD_Q"],
    "grad_kv_kernel": ["GRAD_K", "GRAD_V"],
    "norm_kernel": ["NORMS", "COUNTS"],
    "grad_kernel": ["GRAD", "SUMS"],
    "sum_kernel": ["LOSS"],
}


class _Driver:
    """As much of a driver as a launch asks for before it launches."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> str:
        return f"emulated sm_{self.arch}"  # compiled kernels are kept by device, and these have no machine code

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def _only_ptx(*arguments):
    """A hook of Triton's compiler: leaves out the assembler, whose result nothing here would read."""
    if arguments:
        arguments[1]["cubin"] = lambda source, metadata: b""
    return "only PTX", "only PTX"


def _leaves(name: str, kind: str | tuple, value: object) -> dict[str, object]:
    """What a launch passes for one argument of this signature: a struct's fields one by one, and no constants."""
    if kind == "constexpr":
        return {}
    if isinstance(kind, str):
        return {name: value}
    fields = zip(value._fields, kind, value, strict=True)
    return {key: leaf for field, *pair in fields for key, leaf in _leaves(f"{name}.{field}", *pair).items()}


@cache
def _module(text: str) -> emulator.Module:
    return emulator.Module(text)


unavailable = emulator.unavailable


@contextlib.contextmanager
def on_emulator(arch: int) -> Iterator[list[str]]:
    """Within the block ``use_backend("triton")`` serves CPU tensors; lists the kernels that were launched."""
    launched: list[str] = []
    left: dict[int, int] = {}  # bytes of outputs that a launch left to the merge, by address
    compile_or_launch, knobs = JITFunction.run, triton.knobs.runtime
    previous = triton.runtime.driver._active, knobs.add_stages_inspection_hook, triton.knobs.cache.dir

    def run(self, *args, grid, warmup, **options):
        kernel = compile_or_launch(self, *args, grid=grid, warmup=True, **options)
        given = dict(zip(self.arg_names, args, strict=False)) | options
        arguments: dict[str, object] = {}
        for name, kind in kernel.src.signature.items():
            arguments |= _leaves(name, kind, given[name])
        name = self.fn.__name__
        outputs = {key: arguments[key] for key in OUTPUTS.get(name, ())}
        before = {key: x.clone() for key, x in outputs.items()}
        result = _module(kernel.asm["ptx"]).launch(
            kernel.metadata.name, grid, (32 * kernel.metadata.num_warps,), arguments, kernel.metadata.shared,
            seed=len(launched), poison=outputs,
        )  # fmt: skip
        for key, x in outputs.items():
            wanted = 0
            if name == "merge_kernel" and x.data_ptr() in left:  # the rows of the tail; the others stay as they are
                wanted = x.nbytes - left.pop(x.data_ptr())
                x.copy_(before[key].where(x.isnan(), x))
            elif name == "forward_kernel" and result.unwritten[key]:  # all tiles but for the tail
                wanted = left[x.data_ptr()] = result.unwritten[key]
            assert result.unwritten[key] == wanted, f"{name} leaves {result.unwritten[key]} bytes of {key} unwritten"
        launched.append(name)
        return kernel

    JITFunction.run = run
    triton.runtime.driver._active = _Driver(arch)
    knobs.add_stages_inspection_hook = _only_ptx
    triton.knobs.cache.dir = str(CACHE)
    try:
        with serving("triton"):
            yield launched
        assert not left, "a tail was never merged"
    finally:
        JITFunction.run = compile_or_launch
        triton.runtime.driver._active, knobs.add_stages_inspection_hook, triton.knobs.cache.dir = previous
