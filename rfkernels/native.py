"""The compiled kernels, if they are there: `torch.ops.rfkernels_native`, and the reason if they are not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from .toolchain import OLDEST_TORCH, oldest_torch


def torch_version() -> tuple[int, int]:
    """Major and minor version of the torch that runs."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def _load() -> str | None:
    """Loads the kernel library; returns why it could not."""
    if torch_version() < OLDEST_TORCH:
        return f"torch {torch.__version__} is older than {oldest_torch()}, which they need"
    libraries = sorted(Path(__file__).parent.glob("rfkernels_kernels.*"))
    if not libraries:
        return (
            "this is a Python-only install: when it was built there was no C++ compiler, or no torch >= "
            f"{oldest_torch()} in the environment (reinstall with both present)"
        )
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load: {error}"
    return None


missing: str | None = _load()
"""Why the compiled kernels are missing, or None where they are loaded."""


def _cuda() -> tuple[str | None, str, str, tuple[int, ...]]:
    """Why there are no CUDA kernels (None: there are), and the CUDA, architectures and head sizes of their build."""
    if missing is not None:
        return missing, "", "", ()
    _C: Any = importlib.import_module(f"{__package__}._C")
    reason = None if _C.cuda else f"built without CUDA kernels: {_C.cuda_reason}"
    head_dims = tuple(int(d) for d in filter(None, _C.cuda_head_dims.split(", ")))
    return reason, _C.cuda, _C.cuda_architectures, head_dims


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
