"""What `make gpu-check` asks a machine, as data: the commands of each step, how long they have, why one cannot run."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

RESULT = "{result}"  # in a command: the file that it leaves its figures in, as JSON

PYTHON = (sys.executable, "-u")
PYTEST = (*PYTHON, "-m", "pytest", "-vv", "-p", "no:cacheprovider")  # a line for each test, as it ends
BENCH = (*PYTHON, "-m", "rfkernels", "bench")
BACKENDS = ("reference", "sdpa", "library", "triton", "cuda")

# The public functions on the device, beside the suites of the kernels themselves.
OPERATIONS = ("on_gpu", "streaming", "cache", "chunk_attention", "window", "redmd", "ops")

ROWS = (
    "attention/half or attention/frames or begin_chunk/paper or write/paper or chunk/paper or chunk/half "
    "or chunk_attention_training/paper or sequence/clip or sequence_training/clip or redmd"
)
CPU_ROWS = "begin_chunk/quarter/float32 or write/quarter/float32"

SANITIZERS = {
    "memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else a read beyond a tensor is one within torch's block
    "racecheck": {},
    "synccheck": {},
}


def _always() -> str | None:
    return None


@dataclass(frozen=True)
class Step:
    """One question, in processes of its own: a fault of one leaves the device to the next.

    commands: by name; they run side by side. limit: seconds that they have, less where the budget ends before.
    missing: why the step cannot run here, or None; asked when its turn comes. decides: a failure fails the check.
    """

    name: str
    about: str
    commands: dict[str, tuple[str, ...]]
    limit: float
    missing: Callable[[], str | None] = _always
    environment: dict[str, str] = field(default_factory=dict)
    decides: bool = True


def tool(name: str) -> str | None:
    """Of a CUDA toolkit, whose folder need not be on the path."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def lacking(name: str) -> Callable[[], str | None]:
    return lambda: None if tool(name) else f"{name} is not here"


def parallel(processes: int) -> tuple[str, ...]:
    """More processes for a suite, where pytest-xdist is installed."""
    return ("-n", str(processes)) if importlib.util.find_spec("xdist") else ()


def _machine() -> Step:
    commands = {"info": (*PYTHON, "-m", "rfkernels", "info"), "packages": (*PYTHON, "-m", "pip", "list")}
    if smi := tool("nvidia-smi"):
        commands |= {"nvidia-smi": (smi,), "clocks": (smi, "-q", "-d", "CLOCK,POWER,PERFORMANCE")}
    return Step("machine", "what is there", commands, 40, decides=False)


def _smoke(limit: float) -> Step:
    commands = {name: (*PYTEST, "tests/test_smoke.py", "-m", "", "-k", name) for name in BACKENDS[1:]}
    return Step("smoke", "every backend at head size 128 against float64", commands, limit)


def on_gpu(architecture: str, library: Callable[[], str | None]) -> Iterator[Step]:
    """architecture: to build for, e.g. "9.0a". library: why the compiled library need not or cannot be built."""
    yield _machine()
    build = (*PYTHON, "setup.py", "build_ext", "--inplace")
    built_for = {"TORCH_CUDA_ARCH_LIST": architecture, "RFKERNELS_HEAD_DIMS": "64 128"}
    yield Step("library", "the compiled library, where none loads", {"build": build}, 180, library, built_for)
    yield _smoke(120)
    rows = (*BENCH, "-k", "attention/paper and not chunk", "--cuda-graph", "--no-compile", "--json", RESULT)
    yield Step("speed", "a streaming pass of the paper's shape beside SDPA, and the ceilings", {"bench": rows}, 75)
    operations = tuple(f"tests/test_{name}.py" for name in OPERATIONS)
    suites = {
        "triton": (*PYTEST, *parallel(4), "tests/triton_backend"),
        "cuda": (
            *PYTEST,
            *parallel(4),
            "tests/cuda_backend",
            "tests/cuda/test_forward.py",
            "tests/cuda/test_backward.py",
        ),
        "operations": (*PYTEST, *parallel(4), *operations),
    }
    yield Step("suites", "the tests of the kernels and of the operations", suites, 180)
    for name, environment in SANITIZERS.items():
        checked = (str(tool("compute-sanitizer")), "--tool", name, "--kernel-name", "kernel_substring=rf_")
        checked += ("--error-exitcode", "9", *PYTEST)
        commands = {
            "backend": (*checked, "tests/test_smoke.py", "-k", "cuda"),
            "sm_80": (*checked, "tests/cuda/test_forward.py", "-k", "test_chunk and sm_80"),
        }
        about = f"compute-sanitizer's {name} on the C++ kernels"
        yield Step(name, about, commands, 60, lacking("compute-sanitizer"), environment)
    rows = (*BENCH, "-k", ROWS, "--cuda-graph", "--no-compile", "--seconds", "0.5", "--json", RESULT)
    yield Step("bench", "the other operations", {"bench": rows}, 120)
    model = {"pass": (*BENCH, "model", "--json", RESULT)}
    yield Step("model", "a pass of the 1.3B model by phase, random weights", model, 60, decides=False)
    for name, option in (("eager", ()), ("compiled", ("--compile",)), ("graphs", ("--cuda-graph",))):
        stream = {"stream": (*BENCH, "e2e", *option, "--quick", "--json", RESULT)}
        yield Step(f"e2e-{name}", f"frames/s of the 1.3B sizes, {name}, random weights", stream, 120, decides=False)
    for name, kernel in (("cuda", "rf_attention_forward"), ("triton", "^forward_kernel")):
        sections = [x for s in ("SpeedOfLight", "Occupancy", "WarpStateStats") for x in ("--section", s)]
        profile = (str(tool("ncu")), "--clock-control", "none", "-k", f"regex:{kernel}", "-c", "1", *sections, *BENCH)
        profile += ("-k", "attention/paper and not chunk", "--no-compile", "--seconds", "0.1")
        about = f"the attention kernel of {name} under ncu"
        yield Step(f"ncu-{name}", about, {"ncu": profile}, 60, lacking("ncu"), decides=False)


def on_cpu() -> Iterator[Step]:
    """The same steps at shapes that a CPU has time for, kernels on the emulator: what can be tried without a GPU."""
    yield _machine()
    yield Step("library", "the compiled library", {"build": ()}, 1, lambda: "a CPU needs no CUDA kernels")
    yield _smoke(240)
    rows = (*BENCH, "--device", "cpu", "-k", "attention/quarter/float32 and not chunk", "--no-compile")
    yield Step("speed", "a later pass beside SDPA, and the ceilings", {"bench": (*rows, "--json", RESULT)}, 60)
    suites = {
        "triton": (*PYTEST, "tests/test_triton_emulated.py", "-k", "loss and sm_80"),
        "cuda": (*PYTEST, "tests/cuda_backend/test_grid.py", "-k", "redmd_loss"),
    }
    yield Step("suites", "a few tests on the emulator", suites, 120)
    for name in SANITIZERS:
        yield Step(name, f"compute-sanitizer's {name}", {"backend": ()}, 1, lambda: "it needs a GPU")
    rows = (*BENCH, "--device", "cpu", "-k", CPU_ROWS, "--seconds", "0.2", "--no-compile", "--json", RESULT)
    yield Step("bench", "two operations", {"bench": rows}, 60)
    model = {"pass": (*BENCH, "model", "--device", "cpu", "--preset", "tiny", "--json", RESULT)}
    yield Step("model", "a pass of the tiny model by phase", model, 60, decides=False)
    stream = (*BENCH, "e2e", "--device", "cpu", "--preset", "tiny", "--quick", "--json", RESULT)
    yield Step("e2e-eager", "frames/s of the tiny model", {"stream": stream}, 60, decides=False)
    yield Step("ncu-cuda", "the attention kernel under ncu", {"ncu": ()}, 1, lambda: "it needs a GPU", decides=False)
