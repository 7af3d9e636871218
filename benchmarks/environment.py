"""Where figures come from: the machine, the software, the commit, and what the machine can do at most."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import rfkernels as rf
from rfkernels import native

from .timing import Timer, interleaved, stats, taken


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _commit() -> str:
    """Of the source tree, marked where files differ from it; unknown outside one."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return "unknown"
        return git("rev-parse", "--short", "HEAD") + (" (modified)" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def environment(device: torch.device, **settings: object) -> dict[str, object]:
    """As printed and saved. settings: options that change what is timed."""
    found: dict[str, object] = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rfkernels": rf.__version__,
        "commit": _commit(),
        "device": device.type,
        "cpu": f"{_cpu()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _triton(),
        "compiled kernels": native.missing or "yes",
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{gpu.name}, {gpu.multi_processor_count} SMs, sm_{gpu.major}{gpu.minor}"
    return found | settings


def ceilings(device: torch.device, timer: Timer, seconds: float = 1.0) -> dict[str, dict[str, float]]:
    """What the machine does at most: TFLOP/s of a square matrix product by dtype, GB/s of a copy (read plus write).

    Each with the 20 and 80 % quantiles of its rounds, which show how steady the clock is.
    """
    on_gpu = device.type == "cuda"
    size, nbytes = (8192, 1 << 30) if on_gpu else (1024, 1 << 27)
    functions, work = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out, name = torch.empty_like(a), str(dtype).removeprefix("torch.")
        functions[name] = lambda a=a, b=b, out=out: torch.mm(a, b, out=out)
        work[name] = 2.0 * size**3 / 1e12
    source, target = (torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2))
    functions["copy"], work["copy"] = lambda: target.copy_(source), 2.0 * nbytes / 1e9
    times = interleaved(functions, timer, seconds)
    found = {}
    for name, values in times.items():
        middle, low, high = stats(taken(values))
        unit = "GB/s" if name == "copy" else "TFLOP/s"
        found[name] = {unit: work[name] / middle, "low": work[name] / high, "high": work[name] / low}
    return found


def floor_seconds(work, dtype: torch.dtype, ceilings: dict) -> float:
    """The least time the machine would need for this work at its measured ceilings.

    A half dtype is held to the faster of its own product and float32's: CPUs without half-precision units convert.
    """
    own = ceilings.get(str(dtype).removeprefix("torch."), ceilings["float32"])["TFLOP/s"]
    rate = max(own, ceilings["float32"]["TFLOP/s"]) if dtype.itemsize == 2 else own
    return max(work.flops / (rate * 1e12), work.bytes / (ceilings["copy"]["GB/s"] * 1e9))
