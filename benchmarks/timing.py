"""Interleaved timing, on a CPU and on a CUDA device behind one interface."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import NamedTuple, Protocol

import torch


class Stats(NamedTuple):
    """Seconds (or a ratio): the median, and the 20 % and 80 % quantiles."""

    median: float
    low: float
    high: float


def stats(values: list[float]) -> Stats:
    values = sorted(values)
    return Stats(median(values), values[len(values) // 5], values[-1 - len(values) // 5])


class Timer(Protocol):
    """How the seconds of one call are found: `measure`, or, for a device that runs behind, later, by `flush`."""

    def measure(self, function: Callable[[], object]) -> Callable[[], float]:
        """Calls the function; what is returned gives its seconds once the round is over."""

    def mark(self) -> object:
        """A moment; see `between`."""

    def between(self, first: object, second: object) -> float:
        """Seconds from one mark to another, once the round is over."""

    def end_round(self) -> None:
        """Waits for everything that was measured."""


class CpuTimer:
    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def measure(self, function: Callable[[], object]) -> Callable[[], float]:
        start = self.clock()
        function()
        seconds = self.clock() - start
        return lambda: seconds

    def mark(self) -> float:
        return self.clock()

    def between(self, first: float, second: float) -> float:
        return second - first

    def end_round(self) -> None:
        pass


class CudaTimer:
    """CUDA events around each call, with a cold L2. Never run on a device so far.

    graph: calls are captured once in a CUDA graph and replayed, so that the launches of a slow host are not counted;
    what cannot be captured is timed as it is.
    """

    def __init__(self, device: torch.device, graph: bool = False, cuda=torch.cuda):
        if not cuda.is_available():
            raise RuntimeError("the CUDA timer needs a CUDA device, and torch sees none")
        self.cuda, self.graph = cuda, graph
        l2 = getattr(cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._dirt = torch.empty(2 * l2, dtype=torch.int8, device=device)
        self._graphs: dict[Callable, Callable[[], object]] = {}
        self.not_captured: dict[Callable, str] = {}

    def _replay(self, function: Callable[[], object]) -> Callable[[], object]:
        if function not in self._graphs:
            stream = self.cuda.current_stream()
            try:
                graph, side = self.cuda.CUDAGraph(), self.cuda.Stream()
                side.wait_stream(stream)
                with self.cuda.stream(side):  # allocations and first calls happen outside the capture
                    function()
                stream.wait_stream(side)
                with self.cuda.graph(graph):
                    function()
                self._graphs[function] = graph.replay
            except RuntimeError as error:
                self.cuda.set_stream(stream)  # a capture that fails leaves its own stream current
                self.not_captured[function] = str(error).splitlines()[0]
                self._graphs[function] = function
        return self._graphs[function]

    def measure(self, function: Callable[[], object]) -> Callable[[], float]:
        function = self._replay(function) if self.graph else function
        self._dirt.zero_()  # evicts what the last call left in L2
        start = self.mark()
        function()
        end = self.mark()
        return lambda: self.between(start, end)

    def mark(self):
        event = self.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first, second) -> float:
        return first.elapsed_time(second) / 1e3

    def end_round(self) -> None:
        self.cuda.synchronize()


def make_timer(device: torch.device, graph: bool = False) -> Timer:
    return CpuTimer() if device.type == "cpu" else CudaTimer(device, graph)


def keep_memory() -> None:
    """Lets glibc keep freed memory: without page faults for large temporaries, as another allocator might do it."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold = -1, -3
        libc.mallopt(m_trim_threshold, 1 << 30)
        libc.mallopt(m_mmap_threshold, 1 << 30)


@contextlib.contextmanager
def no_collections():
    """Python's garbage collector stays out of what is timed."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


Rounds = dict[str, list[float | None]]


def interleaved(
    functions: dict[str, Callable[[], object]],
    timer: Timer | None = None,
    seconds: float = 3.0,
    least: int = 7,
    around: dict[str, Callable[[], contextlib.AbstractContextManager]] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Seconds of each call, in rounds that run every function once, so that a slow moment hits all alike.

    A function that takes many times as long as the fastest one sits out some rounds (None). Rounds go on for
    ``seconds``, but there are at least ``least``. around: a context for each function, entered outside the timing.
    """
    timer, around = timer or CpuTimer(), around or {}

    def measure(name: str) -> Callable[[], float]:
        with around.get(name, contextlib.nullcontext)():
            return timer.measure(functions[name])

    def run(names) -> dict[str, float]:
        pending = {name: measure(name) for name in names}
        timer.end_round()
        return {name: value() for name, value in pending.items()}

    run(functions)
    warm = run(functions)
    fastest = min(warm.values())
    every = {name: max(1, min(4, int(warm[name] / (4 * fastest + 1e-12)))) for name in functions}
    times: Rounds = {name: [] for name in functions}
    end, rounds = clock() + seconds, 0
    with no_collections():
        while rounds < least or clock() < end:
            found = run([name for name in functions if rounds % every[name] == 0])
            for name in functions:
                times[name].append(found.get(name))
            rounds += 1
    return times


def taken(values: list[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def ratio(times: Rounds, name: str, other: str) -> Stats:
    """Of ``name`` to ``other``, round by round."""
    pairs = zip(times[name], times[other], strict=True)
    return stats([a / b for a, b in pairs if a is not None and b is not None])
