"""The build's answers about CUDA, and what lies in a built library."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rfkernels import native

ROOT = Path(__file__).parent.parent


def configure(tmp_path: Path, nvcc: str, torch_cuda: str) -> subprocess.CompletedProcess:
    cmake = pytest.importorskip("cmake")
    if not (ROOT / "CMakeLists.txt").exists():
        pytest.skip("no source tree beside the tests")
    pybind11 = pytest.importorskip("pybind11").get_cmake_dir()
    options = {
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        "RF_TORCH_DIR": Path(torch.__file__).parent,
        "RF_TORCH_VERSION": "2.14.1",
        "RF_TORCH_CUDA": torch_cuda,
        "RF_NVCC": nvcc,
    }
    command = [Path(cmake.CMAKE_BIN_DIR) / "cmake", "-G", "Ninja", "-S", ROOT, "-B", tmp_path / "build"]
    command += [f"-D{name}={value}" for name, value in options.items()]
    command += [f"-DCMAKE_MAKE_PROGRAM={Path(sys.executable).parent / 'ninja'}"]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True)


def fake_nvcc(folder: Path, release: str) -> str:
    """Says that it is of a release, and that its toolkit lies in ``folder``."""
    for name in ("lib64/libcudart_static.a", "include/cuda_runtime_api.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    nvcc = folder / "nvcc"
    release = f'echo "Cuda compilation tools, release {release}, V{release}.1"'
    nvcc.write_text(f'#!/bin/sh\n{release}\necho "#$ TOP={folder}" >&2\n')
    nvcc.chmod(0o755)
    return str(nvcc)


def test_another_major_version_of_cuda_stops_the_build(tmp_path):
    done = configure(tmp_path, fake_nvcc(tmp_path, "12.8"), "13.0")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "nvcc is of CUDA 12.8" in said and "CUDA 13.0" in said, said


def test_a_minor_difference_warns(tmp_path):
    done = configure(tmp_path, fake_nvcc(tmp_path, "13.2"), "13.0")
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "CUDA 13.2" in said and "a minor difference" in said, said


def test_without_nvcc_it_builds_for_the_cpu_and_says_so(tmp_path):
    done = configure(tmp_path, "", "13.0")
    assert done.returncode == 0 and "CPU kernels only: no nvcc was found" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "built, capability, runs",
    [
        ("8.0, 9.0+PTX, 12.0+PTX", (8, 0), True),
        ("8.0, 9.0+PTX, 12.0+PTX", (8, 9), True),
        ("8.0, 9.0+PTX, 12.0+PTX", (10, 0), True),  # B200: by the PTX of 9.0
        ("8.0, 12.0+PTX", (10, 0), False),  # newer PTX is refused
        ("8.0", (9, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a", (10, 0), False),
        ("12.0a", (12, 0), True),
        ("12.0a", (12, 1), False),  # that architecture only
    ],
)
def test_which_gpus_a_build_serves(monkeypatch, built, capability, runs):
    monkeypatch.setattr(native, "cuda_architectures", built)
    assert native.cuda_runs_on(capability) is runs


def cuobjdump() -> str | None:
    spec = importlib.util.find_spec("triton")
    found = [] if spec is None else list(Path(spec.origin).parent.rglob("cuobjdump"))
    return str(found[0]) if found else None


def test_the_library_holds_what_it_says():
    """Machine code for every architecture that was asked for, and PTX where it was."""
    if native.cuda_missing is not None:
        pytest.skip(native.cuda_missing)
    if cuobjdump() is None:
        pytest.skip("no cuobjdump (it comes with Triton)")
    (library,) = Path(native.__file__).parent.glob("rfkernels_kernels.*")
    listed = {
        kind: subprocess.run([cuobjdump(), f"-l{kind}", library], capture_output=True, text=True).stdout
        for kind in ("elf", "ptx")
    }
    for name in native.cuda_architectures.split(", "):
        number = name.removesuffix("+PTX").replace(".", "")
        assert f"sm_{number}.cubin" in listed["elf"], listed
        assert (f"sm_{number}.ptx" in listed["ptx"]) or not name.endswith("+PTX"), listed
