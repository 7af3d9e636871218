"""Compiles the Triton kernels that a call would launch, for any architecture, without a GPU.

The backend's own functions run on meta tensors (shapes, no data) while launches are answered by the compiler: what is
compiled is what that call would launch on that architecture, tile choice and argument specialisation included.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 90, 100, 120)
# Shared memory that one block may have, and an SM has, in bytes (CUDA programming guide, technical specifications).
SHARED_BLOCK = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
SHARED_SM = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
THREADS_SM = {80: 2048, 90: 2048, 100: 2048, 120: 1536}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _Driver:
    """As much of a driver as a launch asks for before it launches."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


def ctas_per_sm(arch: int, registers: int, warps: int, shared: int) -> tuple[int, int, int]:
    """Blocks of an SM by its registers, its shared memory and its threads."""
    allocated = -(-registers // 8) * 8 * 32 * warps  # per warp, in units of 256
    shared += 1024  # the system's own
    return 65536 // allocated, SHARED_SM[arch] // shared, THREADS_SM[arch] // (32 * warps)


@dataclass
class Compiled:
    """One launch: the kernel's name, its constexprs, and what the assembler made of it."""

    name: str
    arch: int
    options: dict
    warps: int
    stages: int
    shared: int
    registers: int
    stack: int
    cubin: bytes = field(repr=False)
    ptx: str = field(repr=False)

    @functools.cached_property
    def sass(self) -> str:
        return _tool("nvdisasm", self.cubin)

    @property
    def spills(self) -> int:
        """Instructions that move registers to and from local memory, of which there is none without a stack."""
        return len(re.findall(r"\b(?:STL|LDL)\b", self.sass)) if self.stack else 0

    @property
    def ctas_per_sm(self) -> int:
        return min(*ctas_per_sm(self.arch, self.registers, self.warps, self.shared), 32)


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, bytes of its stack."""
    usage = _tool("cuobjdump", cubin, "-res-usage")
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return registers, stack


def _describe(kernel, name: str, arch: int, options: dict) -> Compiled:
    meta, cubin = kernel.metadata, kernel.asm["cubin"]
    return Compiled(
        name, arch, options, meta.num_warps, meta.num_stages, meta.shared, *_usage(cubin), cubin, kernel.asm["ptx"]
    )


@contextlib.contextmanager
def recording(arch: int) -> Iterator[list[Compiled]]:
    """Within the block, launches are compiled for ``arch`` and listed instead of run."""
    launched: list[Compiled] = []
    run, active = JITFunction.run, triton.runtime.driver._active

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        names = [p.name for p in self.params if p.is_constexpr]
        options = {name: kwargs[name] for name in names if name in kwargs}
        launched.append(_describe(kernel, self.fn.__name__, arch, options))

    JITFunction.run = compile_only
    triton.runtime.driver._active = _Driver(arch)
    try:
        yield launched
    finally:
        JITFunction.run = run
        triton.runtime.driver._active = active


def compiled(call: Callable[[], object], arch: int) -> list[Compiled]:
    """The kernels that ``call``, on meta tensors, would launch on ``arch``."""
    with recording(arch) as launched, torch.no_grad():
        call()
    return launched
