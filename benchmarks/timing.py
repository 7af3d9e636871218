"""Interleaved timing on the CPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable
from statistics import median


def keep_memory() -> None:
    """Lets glibc keep freed memory: without page faults for large temporaries, as another allocator might do it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_mmap_threshold, 1 << 30)


def interleaved(
    functions: dict[str, Callable[[], object]], seconds: float = 4.0, least: int = 7
) -> dict[str, list[float]]:
    """Seconds of each call, in rounds that run every function once, so that a slow moment hits all alike."""
    for function in functions.values():
        function()
        function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end = time.perf_counter() + seconds
    gc.disable()
    while time.perf_counter() < end or len(next(iter(times.values()))) < least:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    gc.enable()
    return times


def ratio(times: dict[str, list[float]], name: str, floor: str) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of the round-by-round ratio of two functions."""
    ratios = sorted(a / b for a, b in zip(times[name], times[floor], strict=True))
    return median(ratios), ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5]
