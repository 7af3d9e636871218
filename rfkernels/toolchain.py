"""What compiled code is made with. Imports neither torch nor the package: setup.py loads this file by its path."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path

OLDEST_TORCH = (2, 10)  # the compiled part asks for its stable ABI, which every later one has


def oldest_torch() -> str:
    return ".".join(map(str, OLDEST_TORCH))


def torch_target() -> str:
    """``OLDEST_TORCH`` as torch's headers want it in TORCH_TARGET_VERSION: two digits a part."""
    return f"0x{OLDEST_TORCH[0]:02x}{OLDEST_TORCH[1]:02x}000000000000"


def site_packages() -> list[Path]:
    """Folders to look for torch and nvcc in: pip's isolated build hides them from import, not from the eye."""
    folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def find_nvcc() -> str | None:
    """nvcc in CUDA_HOME, on PATH, or installed by pip (cuda-toolkit[nvcc]); None if there is none.

    The kernels themselves need none once they are built.
    """
    if os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=str(Path(os.environ["CUDA_HOME"]) / "bin"))
    candidates = (nvcc for folder in site_packages() for nvcc in folder.glob("nvidia/cu*/bin/nvcc"))
    return shutil.which("nvcc") or next(map(str, candidates), None)
