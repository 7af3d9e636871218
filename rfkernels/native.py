"""The compiled kernels, if they are there: `torch.ops.rfkernels_native`, and the reason if they are not."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NamedTuple

import torch

from .toolchain import OLDEST_TORCH, oldest_torch, site_packages


def torch_version() -> tuple[int, int]:
    """Major and minor version of the torch that runs."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


class Build(NamedTuple):
    """What the library was made by and for (csrc/host/build.cpp)."""

    torch_version: str  # built against, e.g. "2.14.1+cu130"; it runs on every torch from torch_target on
    torch_target: str
    compiler: str
    cuda: str  # "" for a CPU-only build
    cuda_architectures: str  # "8.0, 9.0+PTX"
    cuda_head_dims: str  # of the attention kernels, "64, 128"
    cuda_reason: str  # why there are no CUDA kernels, "" where there are


def _read_build(library: Path) -> Build:
    """Raises:
    AttributeError: the library does not say, being of another version of the package.
    """
    function = ctypes.CDLL(str(library)).rfkernels_build
    function.restype = ctypes.c_char_p
    lines = (line.partition("=") for line in function().decode().split("\n"))
    facts = {name: value for name, _, value in lines}
    try:
        return Build(**facts)
    except TypeError as error:
        raise AttributeError(str(error)) from None


def why_none_was_built(package: Path) -> str:
    """Why the folder of the package holds no library: a Python-only install, or a source tree that hides the install.

    Python started in a clone imports the clone's ``rfkernels/``, which holds a library only after ``pip install -e``.
    """
    tree = package.parent
    if not (tree / "setup.py").is_file():
        return (
            "this is a Python-only install: when it was built there was no C++ compiler, no cmake, or no torch >= "
            f"{oldest_torch()} in the environment (reinstall with all of them present)"
        )
    elsewhere = (folder / package.name for folder in site_packages() if folder.resolve() != tree.resolve())
    installed = next((folder for folder in elsewhere if (folder / "native.py").is_file()), None)
    if installed is not None:
        return (
            f"Python imported the source tree in {tree}, where nothing is compiled, and not the package installed in "
            f"{installed}: start Python in another folder"
        )
    return (
        f"Python imported the source tree in {tree}, where nothing is compiled: run `pip install .` there and start "
        "Python in another folder, or run `pip install -e .`"
    )


def _load() -> tuple[str | None, Build | None]:
    """Loads the kernel library; returns why it could not, and what it says of itself."""
    if torch_version() < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {oldest_torch()}, which they need", None
    libraries = sorted(path for path in Path(__file__).parent.glob("rfkernels_kernels.*") if path.suffix != ".new")
    if not libraries:
        return why_none_was_built(Path(__file__).parent), None
    try:
        build = _read_build(libraries[0])
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}", None
    except AttributeError:
        return f"{libraries[0].name} is of another version of this package: reinstall it", None
    return None, build


missing, build = _load()
"""Why the compiled kernels are missing, or None where they are loaded; then what they were made by and for."""


def _cuda() -> tuple[str | None, str, str, tuple[int, ...]]:
    """Why there are no CUDA kernels (None: there are), and the CUDA, architectures and head sizes of their build."""
    if build is None:
        return missing, "", "", ()
    reason = None if build.cuda else f"built without CUDA kernels: {build.cuda_reason}"
    head_dims = tuple(int(d) for d in filter(None, build.cuda_head_dims.split(", ")))
    return reason, build.cuda, build.cuda_architectures, head_dims


cuda_missing, cuda_version, cuda_architectures, cuda_head_dims = _cuda()
"""Why the CUDA kernels are missing, or None; their build, e.g. ``"13.0"``, ``"8.0, 9.0+PTX"`` and ``(64, 128)``."""


def cuda_runs_on(capability: tuple[int, int]) -> bool:
    """Whether a GPU can run one of ``cuda_architectures``: machine code of its major version, or older PTX."""
    for name in filter(None, cuda_architectures.split(", ")):
        number, ptx = name.removesuffix("+PTX"), name.endswith("+PTX")
        if number == "9.0a":  # adds kernels with wgmma; the others are built for 9.0
            number = "9.0"
        if number[-1].isalpha():  # 12.0a: that architecture only
            if number[:-1] == "{}.{}".format(*capability):
                return True
            continue
        major, minor = (int(part) for part in number.split("."))
        if (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


def serves(x: torch.Tensor) -> bool:
    """Whether compiled kernels exist for tensors like ``x``."""
    return missing is None and x.device.type == "cpu"
