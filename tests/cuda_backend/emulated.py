"""The CUDA backend on CPU tensors: the host code as it is, its launches executed by the PTX emulator.

``csrc/host/cuda/*.cpp`` are compiled with ``runtime.cpp`` of this folder in place of the CUDA runtime and register the
schemas of the compiled operators once more, as ``torch.ops.rfkernels_emulated``. A launch arrives in `_launch` with the
kernel's name, its argument as bytes and the tensors that it points to, and runs the PTX that nvcc makes of the same
``csrc/cuda/**/*.cu``. Builds are kept under build/ by the content of what they are made of.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import patched
import torch
from cuda.conftest import cuda_ptx
from filelock import FileLock
from ptx import compile as ptx_compile
from ptx import emulator

from rfkernels import native
from rfkernels.backends.cuda import compiled, requests
from rfkernels.contract import ops
from rfkernels.toolchain import torch_target

ROOT = Path(__file__).parents[2]
CSRC, HERE = ROOT / "csrc", Path(__file__).parent
BUILD = ROOT / "build" / "cuda_emulated"
NAMESPACE = "rfkernels_emulated"

launches: list[tuple[str, emulator.Result]] = []
"""What ran since the list was last cleared: names of kernels and the emulator's counts."""


class Plan(NamedTuple):
    kernel: str
    grid: tuple[int, int]
    threads: int
    shared_bytes: int


_plans: list[Plan] | None = None

failure: Exception | None = None
"""What the emulator objected to last; the host code can only pass on its text."""


def unavailable() -> str | None:
    """Why the CUDA kernels cannot be emulated here, or None."""
    if not CSRC.exists():
        return "no source tree beside the tests"
    if ptx_compile.find_nvcc() is None:
        return "no nvcc: the CUDA kernels cannot be compiled to PTX"
    return emulator.unavailable()


def _digest(paths: Iterable[Path], *more: str) -> str:
    digest = hashlib.sha256("\n".join(more).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[:4000]}")


@cache
def _module(kernel: str) -> emulator.Module:
    """The module that holds a kernel: compiled at its first launch, kept under build/ until a source changes."""
    (source,) = [
        path for path in (CSRC / "cuda").rglob("*.cu") if re.search(rf"\b{kernel}\b", path.read_text(encoding="utf-8"))
    ]
    return _modules(str(source.relative_to(CSRC / "cuda").with_suffix("")))


@cache
def _modules(name: str) -> emulator.Module:
    return emulator.Module(cuda_ptx(name))


def _library() -> Path:
    """The host code, compiled with the emulated runtime."""
    host = (path for path in (CSRC / "host" / "cuda").glob("*.cpp") if path.name != "runtime.cpp")
    sources = [*sorted(host), HERE / "runtime.cpp"]
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-DTORCH_TARGET_VERSION={torch_target()}"]
    flags += [
        f"-DRF_NATIVE_NAMESPACE={NAMESPACE}",
        f"-DRF_CUDA_NAMESPACE={NAMESPACE}",
        "-DRF_DISPATCH_KEY=CPU",
        "-DRF_KERNELS_BY_NAME",
    ]
    library = BUILD / f"host-{_digest([*sources, *CSRC.rglob('*.h')], torch.__version__, *flags)}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):  # tests run in several processes
        if not library.exists():
            fresh = library.with_suffix(".new")
            _run(
                [os.environ.get("CXX", "g++"), *flags, "-isystem", torch_folder / "include", "-I", CSRC, *sources,
                 "-L", torch_folder / "lib", "-ltorch_cpu", "-lc10", "-o", fresh]
            )  # fmt: skip
            os.replace(fresh, library)
    return library


@cache
def load():
    """``torch.ops.rfkernels_emulated``, ready to be called."""
    library = ops.define_native(NAMESPACE, ops.NATIVE)
    load.private = requests.define(NAMESPACE, "FRAGMENT")
    library.define(
        "launch(str kernel, int[] grid, int threads, int shared_bytes, Tensor params, Tensor[] tensors, "
        "Tensor[] results) -> ()"
    )
    library.impl("launch", _launch, "CompositeExplicitAutograd")
    load.library = library  # lives as long as the process
    torch.ops.load_library(str(_library()))
    return getattr(torch.ops, NAMESPACE)


@contextmanager
def on_emulator() -> Iterator[None]:
    """Within the block ``use_backend("cuda")`` serves CPU tensors, with kernels of every head size."""
    with ExitStack() as stack:
        for namespace in ("native", "private"):
            stack.enter_context(mock.patch.object(compiled, namespace, load()))
        stack.enter_context(mock.patch.object(native, "cuda_head_dims", (64, 80, 96, 128, 256)))
        stack.enter_context(patched.serving("cuda"))
        launches.clear()
        yield


@contextmanager
def capability(number: int) -> Iterator[None]:
    """Within the block the host code takes kernels for that compute capability (90 for 9.0)."""
    choose = ctypes.CDLL(str(_library())).rf_emulated_capability
    choose(number)
    try:
        yield
    finally:
        choose(80)


@contextmanager
def planning(processors: int, shared_memory: int) -> Iterator[list[Plan]]:
    """Within the block launches are listed, as for a GPU of that size (bytes of a multiprocessor), and not executed."""
    global _plans
    device = ctypes.CDLL(str(_library())).rf_emulated_device
    before, _plans = _plans, []
    device(processors, shared_memory)
    try:
        yield _plans
    finally:
        device(8, 164 << 10)
        _plans = before


def _launch(kernel, grid, threads, shared_bytes, params, tensors, results) -> None:
    global failure
    if _plans is not None:
        _plans.append(Plan(kernel, tuple(grid), threads, shared_bytes))
        return
    try:
        fresh = {f"result {i}": x for i, x in enumerate(results)}
        result = _module(kernel).launch(
            kernel, tuple(grid), (threads,), [bytes(params.numpy())], shared_bytes, seed=len(launches),
            tensors={f"tensor {i}": x for i, x in enumerate(tensors)} | fresh, poison=list(fresh),
        )  # fmt: skip
        unwritten = {name: count for name, count in result.unwritten.items() if count}
        assert not unwritten, f"{kernel} leaves bytes of its results unwritten: {unwritten}"
    except Exception as error:
        failure = error
        raise
    launches.append((kernel, result))
