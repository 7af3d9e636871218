"""PTX from CUDA C++: nvcc from CUDA_HOME, PATH or the pip packages. Triton's comes from samples/triton_kernels.py."""

import subprocess
import tempfile
from functools import cache
from pathlib import Path

from rfkernels.toolchain import find_nvcc


@cache
def nvcc_ptx(source: str, arch: str = "sm_80", flags: tuple = ()) -> str:
    """The PTX of a .cu file, with source lines."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise RuntimeError("no nvcc found")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernel.ptx"
        command = [nvcc, "-ptx", "-lineinfo", "-O3", "-std=c++17", f"-arch={arch}", *flags, source, "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed:\n{done.stderr}")
        return out.read_text()
