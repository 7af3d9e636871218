"""How the build finds torch and nvcc, what it asks of CMake, and what it says where it cannot compile."""

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from rfkernels import native, toolchain
from rfkernels.backends import cuda

ROOT = Path(__file__).parent.parent


def nvcc_in(folder: Path) -> str:
    folder.mkdir(parents=True)
    file = folder / "nvcc"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return str(file)


def test_finds_the_torch_of_the_environment(setup_py):
    folder, version = setup_py.find_torch()
    assert folder == Path(torch.__file__).parent and version == torch.__version__


def test_nvcc_comes_from_cuda_home_then_path_then_pip(setup_py, monkeypatch, tmp_path):
    home, path, pip = (nvcc_in(tmp_path / part) for part in ("home/bin", "path", "site/nvidia/cu13/bin"))
    monkeypatch.setattr(setup_py.toolchain, "site_packages", lambda: [tmp_path / "site"])
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert setup_py.toolchain.find_nvcc() == home
    monkeypatch.delenv("CUDA_HOME")
    assert setup_py.toolchain.find_nvcc() == path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert setup_py.toolchain.find_nvcc() == pip
    monkeypatch.setattr(setup_py.toolchain, "site_packages", lambda: [])
    assert setup_py.toolchain.find_nvcc() is None


@pytest.mark.parametrize(
    "version, reason",
    [(None, "torch is not installed"), ("2.9.1+cu128", "torch 2.9.1.cu128 is older than 2.10"), ("2.10.0", None)],
)
def test_says_why_it_cannot_compile(setup_py, monkeypatch, tmp_path, version, reason):
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.setattr(setup_py.toolchain, "site_packages", lambda: [tmp_path])
    monkeypatch.setattr(setup_py, "find_compiler", lambda: "c++")
    found = setup_py.why_python_only()
    assert (found is None) if reason is None else (reason.replace(".cu", "+cu") in found)


def test_says_why_there_is_no_library(monkeypatch, tmp_path):
    tree, site = tmp_path / "clone" / "rfkernels", tmp_path / "site" / "rfkernels"
    for package in (tree, site):
        package.mkdir(parents=True)
        (package / "native.py").touch()
    monkeypatch.setattr(native, "site_packages", lambda: [tree.parent, site.parent])
    assert "this is a Python-only install" in native.why_none_was_built(site)
    (tree.parent / "setup.py").touch()
    said = native.why_none_was_built(tree)
    assert f"imported the source tree in {tree.parent}" in said and f"not the package installed in {site}" in said
    (site / "native.py").unlink()
    assert "run `pip install .` there and start Python in another folder" in native.why_none_was_built(tree)


def test_says_that_there_is_no_compiler(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "find_torch", lambda: (Path("torch"), "2.14.1"))
    monkeypatch.setattr(setup_py, "find_compiler", lambda: None)
    assert "no C++ compiler" in setup_py.why_python_only()


def test_says_that_there_is_no_cmake(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py, "find_torch", lambda: (Path("torch"), "2.14.1"))
    monkeypatch.setattr(setup_py, "find_compiler", lambda: "c++")
    monkeypatch.setattr(setup_py, "tool", lambda name: str(tmp_path / name))
    assert "cmake was not found (pip install cmake ninja" in setup_py.why_python_only()


@pytest.mark.parametrize(
    "cuda, named, architectures, reason",
    [
        ("13.0", False, "", None),
        ("12.8", False, "", "nvcc is of CUDA 13 (.*), torch 2.14.1 of CUDA 12.8"),
        ("12.8", True, "", None),  # CMakeLists.txt stops the build
        ("", False, "", "torch 2.14.1 has no CUDA"),
        ("", False, "8.0", None),
        ("", True, "", None),
    ],
)
def test_cuda_kernels_that_this_torch_cannot_run_are_left_out(
    setup_py, monkeypatch, tmp_path, cuda, named, architectures, reason
):
    """Unless somebody has asked for them by name."""
    nvcc = fake_nvcc(tmp_path, "13.0")
    monkeypatch.setattr(setup_py.toolchain, "find_nvcc", lambda: nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path) if named else "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    chosen, why = setup_py.choose_nvcc("2.14.1", cuda)
    assert (chosen, why) == (nvcc, "") if reason is None else chosen is None and re.match(reason, why), why


def test_an_old_setuptools_is_named_before_it_fails_on_pyproject(tmp_path):
    """As in a fresh environment of Python 3.10, with --no-build-isolation."""
    (tmp_path / "setuptools.py").write_text("__version__ = '65.5.0'\nExtension = find_packages = setup = None\n")
    code = (
        "import sys, runpy, types, setuptools\n"
        "for name in ('command', 'command.build_ext'): sys.modules[f'setuptools.{name}'] = types.ModuleType(name)\n"
        "sys.modules['setuptools.command.build_ext'].build_ext = object\n"
        f"runpy.run_path({str(ROOT / 'setup.py')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("rfkernels: setuptools 65.5.0 is too old"), done.stderr


def test_without_ninja_cmake_writes_makefiles(setup_py, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_py, "tool", lambda name: str(tmp_path / name))
    assert setup_py.generator() == "Unix Makefiles"


def test_tools_beside_the_interpreter_are_found(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(setup_py.sysconfig, "get_path", lambda _: str(tmp_path / "bin"))
    assert setup_py.tool("nvcc") == "nvcc"
    assert setup_py.tool(Path(nvcc_in(tmp_path / "bin")).name) == str(tmp_path / "bin" / "nvcc")


def test_settings_and_jobs_reach_cmake(setup_py, monkeypatch, tmp_path):
    """Lists with any separators, MAX_JOBS compilers at a time, and a folder for each choice of settings."""
    setuptools = pytest.importorskip("setuptools")
    commands, folders = [], set()
    monkeypatch.setattr(setup_py, "ROOT", tmp_path)
    monkeypatch.setattr(setup_py.subprocess, "check_call", commands.append)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0 9.0+PTX;12.0")
    monkeypatch.setenv("RFKERNELS_HEAD_DIMS", "64, 128")
    monkeypatch.setattr(setup_py.shutil, "copy2", lambda *_: None)
    extension = setuptools.Extension("rfkernels.rfkernels_kernels", [])
    for jobs, expected in (("3", "3"), ("", str(os.cpu_count()))):
        monkeypatch.setenv("MAX_JOBS", jobs)
        command = setup_py.CMakeBuild(setuptools.Distribution({"ext_modules": [extension]}))
        command.build_lib = str(tmp_path / "lib")
        command.ensure_finalized()
        command.build_extension(extension)
        configure, build = commands[-2:]
        assert "-DRF_CUDA_ARCHITECTURES=8.0;9.0+PTX;12.0" in configure and "-DRF_CUDA_HEAD_DIMS=64;128" in configure
        assert f"-DRF_TORCH_VERSION={torch.__version__}" in configure
        assert build[-2:] == ["--parallel", expected]
        folders.add(configure[configure.index("-B") + 1])
    assert len(folders) == 1
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert str(setup_py.build_folder(setup_py.settings())) not in folders


# --- CMakeLists.txt ---------------------------------------------------------------------------------------------------


@pytest.fixture
def configure(setup_py, tmp_path):
    """``configure(nvcc, torch_cuda)``: CMake's first step, as setup.py calls it."""
    cmake, ninja = (shutil.which(setup_py.tool(name)) for name in ("cmake", "ninja"))
    if not (cmake and ninja):
        pytest.skip("cmake and ninja are needed")
    return partial(_configure, [cmake, f"-DCMAKE_MAKE_PROGRAM={ninja}", "-B", tmp_path / "build"])


def _configure(command: list, nvcc: str, torch_cuda: str, **more: str) -> subprocess.CompletedProcess:
    options = {
        "RF_TORCH_DIR": Path(torch.__file__).parent,
        "RF_TORCH_VERSION": "2.14.1",
        "RF_TORCH_CUDA": torch_cuda,
        "RF_TORCH_TARGET": toolchain.oldest_torch(),
        "RF_TORCH_TARGET_CODE": toolchain.torch_target(),
        "RF_NVCC": nvcc,
        "RF_CUDA_REASON": "" if nvcc else "no nvcc was found",
        **more,
    }
    command = [*command, "-G", "Ninja", "-S", ROOT, *(f"-D{name}={value}" for name, value in options.items())]
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


def test_another_major_version_of_cuda_stops_the_build(configure, tmp_path):
    done = configure(fake_nvcc(tmp_path, "12.8"), "13.0")
    said = " ".join(done.stderr.split())
    assert done.returncode != 0 and "nvcc is of CUDA 12.8" in said and "CUDA 13.0" in said, said


def test_a_minor_difference_warns(configure, tmp_path):
    done = configure(fake_nvcc(tmp_path, "13.2"), "13.0")
    said = " ".join(done.stderr.split())
    assert done.returncode == 0 and "CUDA 13.2" in said and "a minor difference" in said, said


def test_without_nvcc_it_builds_for_the_cpu_and_says_so(configure):
    done = configure("", "13.0")
    assert done.returncode == 0 and "CPU kernels only: no nvcc was found" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(
    "option, value, error",
    [
        ("RF_CUDA_ARCHITECTURES", "8.0;Ampere", "TORCH_CUDA_ARCH_LIST must hold entries like 8.0, .* got Ampere"),
        ("RF_CUDA_HEAD_DIMS", "64;72", "RFKERNELS_HEAD_DIMS must be among 64.*256, got 72"),
    ],
)
def test_impossible_settings_are_named(configure, tmp_path, option, value, error):
    done = configure(fake_nvcc(tmp_path, "13.0"), "13.0", **{option: value})
    assert done.returncode != 0 and re.search(error, " ".join(done.stderr.split())), done.stderr


def test_a_library_of_another_version_says_so(monkeypatch, tmp_path):
    """One that is older than what it says of itself: a clear reason, and the package works without it."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or pytest.skip("no C++ compiler")
    source = tmp_path / "other.cpp"
    source.write_text('extern "C" const char* rfkernels_build() { return "torch_version=2.14.1"; }\n')
    library = tmp_path / "rfkernels_kernels.so"
    subprocess.run([compiler, "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    missing, build = native._load()
    assert build is None and missing == "rfkernels_kernels.so is of another version of this package: reinstall it"
    (tmp_path / "other").mkdir()  # of another name: the first is loaded
    (tmp_path / "other" / library.name).write_bytes(b"no library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "other" / "native.py"))
    missing, build = native._load()
    assert build is None and missing.startswith("rfkernels_kernels.so does not load: ")


# --- what a build serves ----------------------------------------------------------------------------------------------


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


def test_a_wheel_of_another_cuda_major_says_so(monkeypatch):
    """torch of CUDA 12 with a wheel of CUDA 13: both are named, and auto takes another backend."""
    monkeypatch.setattr(native, "cuda_missing", None)
    monkeypatch.setattr(native, "cuda_version", "13.0")
    monkeypatch.setattr(native, "cuda_architectures", "8.0+PTX")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    for version, reason in (("12.8", "built with CUDA 13.0, torch with CUDA 12.8"), ("13.2", None)):
        monkeypatch.setattr(torch.version, "cuda", version)
        found = cuda.unavailable(torch.device("cuda"))
        assert (found is None) if reason is None else (reason in found), found
