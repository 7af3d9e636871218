"""host/cuda/runtime.cpp, the only host code that calls CUDA, with a fake runtime that writes down what it is asked."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake_runtime"


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None or not (ROOT / "csrc").exists():
        pytest.skip("needs a C++ compiler and the source tree")
    library = tmp_path_factory.mktemp("runtime") / "calls.so"
    sources = [FAKE / "calls.cpp", ROOT / "csrc" / "host" / "cuda" / "runtime.cpp"]
    # The folder of fakes is the only place where headers of CUDA and torch are looked for.
    flags = ["-std=c++20", "-shared", "-fPIC", "-I", FAKE, "-I", ROOT / "csrc"]
    subprocess.run(list(map(str, [compiler, *flags, *sources, "-o", library])), check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.launch_it.argtypes = [
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_char_p,
    ]
    loaded.ask.argtypes = [ctypes.c_int, ctypes.c_char_p]
    loaded.launch_it.restype = loaded.ask.restype = ctypes.c_char_p
    return loaded


def launch(runtime, *, device=0, x=4, y=1, shared=0, parameter=5, failing="") -> str:
    return runtime.launch_it(device, x, y, shared, parameter, failing.encode()).decode()


def test_a_torch_without_cuda_is_named(runtime):
    """First, before the stream is known; the next launch asks again."""
    runtime.without_cuda(True)
    try:
        assert launch(runtime) == "error: libtorch_cuda.so is not loaded: this torch has no CUDA\n"
    finally:
        runtime.without_cuda(False)
    assert "on stream 1000" in launch(runtime)


@pytest.mark.parametrize("device", [0, 3])
def test_a_launch_is_on_the_current_stream_of_the_tensors_device(runtime, device):
    """Under a guard for that device, and nothing else is called: nothing waits, nothing is copied."""
    assert launch(runtime, device=device, x=4, y=2).splitlines() == [
        f"guard {device}",
        f"launch 77 of 4x2x1 blocks of 128, 0 bytes, parameter 5, on stream {1000 + device}",
        "guard ends",
    ]


def test_more_shared_memory_than_every_kernel_may_have_is_asked_for_first(runtime):
    assert "may have" not in launch(runtime, shared=48 * 1024)
    assert [line.split()[0] for line in launch(runtime, device=1, shared=48 * 1024 + 16).splitlines()] == [
        "guard", "may", "launch", "guard",
    ]  # fmt: skip


def test_nothing_to_do_is_no_launch(runtime):
    assert launch(runtime, x=0) == launch(runtime, y=0) == ""


@pytest.mark.parametrize(
    "options", [{"failing": "cudaLaunchKernel"}, {"failing": "cudaFuncSetAttribute", "shared": 65536}], ids=str
)
def test_an_error_of_the_runtime_is_raised_with_the_kernels_name(runtime, options):
    assert launch(runtime, **options).startswith("error: rf_kernel: the error's text")


@pytest.mark.parametrize("size", [{"x": 2**31}, {"y": 65536}], ids=str)
def test_a_grid_that_no_device_has_is_refused(runtime, size):
    assert "rf_kernel: too many thread blocks" in launch(runtime, **size)
    assert "launch" in launch(runtime, **{name: value - 1 for name, value in size.items()})


def test_the_tensors_device_is_asked_for_its_size(runtime):
    assert runtime.ask(2, b"").decode() == "102 processors, 65536 bytes, compute capability 82\n"
    assert runtime.ask(2, b"cudaDeviceGetAttribute").decode().startswith("error: shared memory of a multiprocessor: ")
