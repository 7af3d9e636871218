"""CUDA kernels as PTX, compiled once (kept under build/ptx until a source changes), executed by the emulator or,
where there is one, by a GPU."""

import hashlib
from functools import cache
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from ptx import emulator
from ptx.compile import find_nvcc, nvcc_ptx

from cuda.device import Module

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "ptx"


def sources_digest() -> str:
    files = sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cu"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def cuda_ptx(name: str) -> str:
    """The PTX of ``csrc/cuda/<name>.cu``, of the oldest architecture that it is for."""
    arch = "sm_90a" if "/sm90/" in name else "sm_80"
    stem = f"{name.replace('/', '_')}.{arch}"
    kept = KEPT / f"{stem}.{sources_digest()}.ptx"
    KEPT.mkdir(parents=True, exist_ok=True)
    with FileLock(KEPT / f"{stem}.lock"):  # tests run in several processes
        if not kept.exists():
            for old in KEPT.glob(f"{stem}.*.ptx"):
                old.unlink(missing_ok=True)
            kept.write_text(nvcc_ptx(str(ROOT / "csrc" / "cuda" / f"{name}.cu"), arch))
        return kept.read_text()


@pytest.fixture(scope="session")
def emulated_module():
    """``emulated_module("attention/merge")``: a module of the emulator, parsed once."""
    if reason := emulator.unavailable():
        pytest.skip(reason)
    if find_nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    return cache(lambda name: emulator.Module(cuda_ptx(name)))


@pytest.fixture(scope="session")
def cuda_module(device, request):
    """The same, on a GPU where there is one."""
    if device.type != "cuda":
        return request.getfixturevalue("emulated_module")
    if find_nvcc() is None:
        pytest.skip("no nvcc: the CUDA kernels cannot be compiled")
    hopper = torch.cuda.get_device_capability(device) == (9, 0)

    @cache
    def module(name: str) -> Module:
        if "/sm90/" in name and not hopper:
            pytest.skip("the kernels of sm_90a run on Hopper only")
        return Module(cuda_ptx(name))

    return module
