"""Builds the emulator once per session; tests skip with a reason where it, nvcc or Triton is not available."""

from pathlib import Path

import pytest
from ptx import emulator
from ptx.compile import find_nvcc, nvcc_ptx

SAMPLES = Path(__file__).parent / "samples"


@pytest.fixture(scope="session")
def ptx():
    """The emulator's Python module: ``ptx.Module(text).launch(...)``."""
    if reason := emulator.unavailable():
        pytest.skip(reason)
    emulator.build()
    return emulator


@pytest.fixture(scope="session")
def sample(ptx):
    """``sample("gemm")``: the PTX of samples/gemm.cu."""
    if find_nvcc() is None:
        pytest.skip("no nvcc: the CUDA samples cannot be compiled")
    return lambda name: nvcc_ptx(str(SAMPLES / f"{name}.cu"))


@pytest.fixture(scope="session")
def triton_kernels(ptx):
    pytest.importorskip("triton", reason="no Triton: its kernels cannot be compiled")
    from ptx.samples import triton_kernels

    return triton_kernels
