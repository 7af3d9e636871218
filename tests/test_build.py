"""How the build finds torch and nvcc, and what it says where it cannot compile."""

import importlib.util
from pathlib import Path

import pytest
import torch

SETUP = Path(__file__).parent.parent / "setup.py"


@pytest.fixture
def build(monkeypatch):
    """setup.py as a module, without its setup() call."""
    setuptools = pytest.importorskip("setuptools")
    if not SETUP.exists():
        pytest.skip("no source tree beside the tests")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("rfkernels_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def nvcc_in(folder: Path) -> str:
    folder.mkdir(parents=True)
    file = folder / "nvcc"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    return str(file)


def test_finds_the_torch_of_the_environment(build):
    folder, version = build.find_torch()
    assert folder == Path(torch.__file__).parent and version == torch.__version__


def test_nvcc_comes_from_cuda_home_then_path_then_pip(build, monkeypatch, tmp_path):
    home, path, pip = (nvcc_in(tmp_path / part) for part in ("home/bin", "path", "site/nvidia/cu13/bin"))
    monkeypatch.setattr(build, "site_packages", lambda: [tmp_path / "site"])
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == home
    monkeypatch.delenv("CUDA_HOME")
    assert build.find_nvcc() == path
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_nvcc() == pip
    monkeypatch.setattr(build, "site_packages", lambda: [])
    assert build.find_nvcc() is None


@pytest.mark.parametrize(
    "version, reason",
    [(None, "torch is not installed"), ("2.9.1+cu128", "torch 2.9.1.cu128 is older than 2.13"), ("2.13.0", None)],
)
def test_says_why_it_cannot_compile(build, monkeypatch, tmp_path, version, reason):
    if version:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = {version!r}\n")
    monkeypatch.setattr(build, "site_packages", lambda: [tmp_path])
    monkeypatch.setattr(build, "find_compiler", lambda: "c++")
    found = build.why_python_only()
    assert (found is None) if reason is None else (reason.replace(".cu", "+cu") in found)


def test_says_that_there_is_no_compiler(build, monkeypatch):
    monkeypatch.setattr(build, "find_torch", lambda: (Path("torch"), "2.14.1"))
    monkeypatch.setattr(build, "find_compiler", lambda: None)
    assert "no C++ compiler" in build.why_python_only()
