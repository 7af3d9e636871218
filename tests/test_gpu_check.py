"""`make gpu-check` without a GPU: that steps are bounded, that nothing found is lost, that what it names is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import figure, gpu_check, gpu_page, gpu_steps, runner
from benchmarks.gpu_steps import RESULT, Step

ROOT = Path(__file__).parents[1]
SAVE = "import json, sys; json.dump({'seconds': 1}, open(sys.argv[1], 'w'))"


def python(code: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-u", "-c", code, *arguments)


def planted(folder: Path) -> list[Step]:
    """One of each kind; every one that runs adds a word to a file."""
    # What it prints ends it where nobody reads any more.
    endless = "import time\nwhile True: print('saved'); time.sleep(0.2)"
    ran = f"open({str(folder / 'ran')!r}, 'a').write"
    return [
        Step("good", "leaves a result", {"a": python(f"{ran}('good '); {SAVE}", RESULT)}, 60),
        Step("absent", "cannot run", {"a": python("1 / 0")}, 60, lambda: "there is none"),
        Step("bad", "one of two fails", {"a": python(f"{ran}('bad ')"), "b": python("print('why'); 1 / 0")}, 60),
        Step(
            "hangs", "leaves a result, and does not end",
            {"a": python(f"{ran}('hangs '); {SAVE}\n{endless}", RESULT)}, 4,
        ),
        Step(
            "last", "prints what the environment says",
            {"a": python(f"{ran}('last '); import os; print(os.environ['X'])")}, 60, environment={"X": "given"},
        ),
    ]  # fmt: skip


@pytest.fixture
def steps(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_check, "facts", lambda device: {"torch": "2.14", "cuda": None, "library": None})
    monkeypatch.setattr(gpu_check, "steps_of", lambda device, known: planted(tmp_path))
    return tmp_path


def found_in(folder: Path) -> dict:
    return json.loads((folder / "out" / "results.json").read_text())["steps"]


def call(folder: Path, *arguments: str) -> int:
    return gpu_check.main(["--out", str(folder / "out"), "--device", "cpu", *arguments])


def test_every_step_leaves_what_it_found(steps, capsys):
    assert call(steps) == 1, "a step failed"
    found = found_in(steps)
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "passed", "absent": "not here", "bad": "failed", "hangs": "timed out", "last": "passed",
    }  # fmt: skip
    assert found["good"]["commands"]["a"]["result"] == found["hangs"]["commands"]["a"]["result"] == {"seconds": 1}
    assert found["absent"]["reason"] == "there is none"
    assert {name: row["status"] for name, row in found["bad"]["commands"].items()} == {"a": "passed", "b": "failed"}
    assert "ZeroDivisionError: division by zero" in found["bad"]["commands"]["b"]["output"][-1]
    assert found["last"]["commands"]["a"]["output"] == ["given"]
    assert sorted(path.name for path in (steps / "out").iterdir()) == ["log.txt", "page.md", "results.json"]
    log = (steps / "out" / "log.txt").read_text()
    assert "[bad/b] why" in log and "[hangs/a] saved" in log
    page = (steps / "out" / "page.md").read_text()
    assert "| hangs | leaves a result, and does not end | timed out" in page and "- bad, b: failed" in page
    assert "absent     not here (there is none)" in capsys.readouterr().out


def test_it_goes_on_with_what_is_left_and_repeats_what_is_named(steps):
    call(steps)
    assert (steps / "ran").read_text().split() == ["good", "bad", "hangs", "last"]
    call(steps)
    assert (steps / "ran").read_text().split() == ["good", "bad", "hangs", "last"], "all have ended"
    assert call(steps, "last") == 1, "the failure of an earlier call counts"
    assert (steps / "ran").read_text().split()[4:] == ["last"]
    assert len(found_in(steps)) == 5


def test_steps_that_have_no_time_are_left_for_the_next_call(steps, monkeypatch):
    """A step is stopped where the budget ends; those after it are not begun."""
    monkeypatch.setattr(gpu_check, "LEAST", 0.5)
    assert call(steps, "hangs", "last", "--minutes", str(2.5 / 60)) == 0
    assert {name: row["status"] for name, row in found_in(steps).items()} == {
        "hangs": "stopped",
        "last": "no time left",
    }
    assert call(steps, "good") == 0
    assert call(steps) == 1
    assert (steps / "ran").read_text().split() == ["hangs", "good", "bad", "hangs", "last"]


KILLED = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
import test_gpu_check as t
from pathlib import Path
t.gpu_check.facts = lambda device: {{"torch": "2.14", "cuda": None, "library": None}}
t.gpu_check.steps_of = lambda device, known: [s for s in t.planted(Path({folder!r})) if s.name in ("good", "hangs")]
t.call(Path({folder!r}))
"""


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_in_the_middle_its_results_are_there(steps, kind):
    code = KILLED.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(steps))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    log = steps / "out" / "log.txt"
    for _ in range(1200):
        if log.exists() and "[hangs/a] saved" in log.read_text():
            break
        time.sleep(0.1)
    os.kill(process.pid, kind)
    assert process.wait() != 0
    found = found_in(steps)
    assert found["good"]["status"] == "passed" and found["good"]["commands"]["a"]["result"] == {"seconds": 1}
    assert found["hangs"]["status"] == "running"
    assert (steps / "out" / "partial-hangs-a.json").exists(), "what it had measured"
    assert "| good |" in (steps / "out" / "page.md").read_text()
    assert "$ " in log.read_text()


def test_outcomes_of_tests_are_read_line_by_line():
    """Also of a run that was stopped; with processes of pytest-xdist, whose lines begin with the outcome."""
    lines = [
        "tests/test_smoke.py::test_against_float64[cuda-torch.bfloat16-life] PASSED   [  8%]",
        "[gw1] [ 12%] FAILED tests/cuda_backend/test_grid.py::test_a_stream[bfloat16-S1] ",
        "[gw0] [ 16%] SKIPPED tests/cuda_backend/test_grid.py::test_the_kernels_of_hopper[stream] ",
        "tests/test_ops.py::test_x ERROR                                   [100%]",
        "tests/test_ops.py::test_y ",
        "FAILED tests/cuda_backend/test_grid.py::test_a_stream[bfloat16-S1] - AssertionError",
    ]
    assert gpu_check.outcomes(lines) == {
        "passed": 1, "failed": 1, "skipped": 1, "error": 1,
        "names": ["tests/cuda_backend/test_grid.py::test_a_stream[bfloat16-S1]", "tests/test_ops.py::test_x"],
    }  # fmt: skip
    assert gpu_check.outcomes(["nothing of the kind"]) is None


def every_step() -> list[Step]:
    return [*gpu_steps.on_gpu("9.0a", lambda: None), *gpu_steps.on_cpu()]


def test_what_the_steps_name_is_there():
    for step in every_step():
        for command in step.commands.values():
            for part in command:
                assert not part.startswith("tests/") or (ROOT / part).exists(), part
            if "bench" in command and "-k" in command[command.index("bench") :]:
                device = torch.device("cpu" if "cpu" in command else "cuda")
                rest = command[command.index("bench") :]
                assert runner.select(device, rest[rest.index("-k") + 1])
    names = [step.name for step in gpu_steps.on_gpu("9.0a", lambda: None)]
    assert names[:5] == ["machine", "library", "smoke", "speed", "suites"] and len(set(names)) == len(names)
    assert {step.name for step in gpu_steps.on_cpu()} <= set(names)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["nothing"], "steps must be among good, absent, bad, hangs, last, got nothing"),
        (["--out", __file__], "--out must be a folder that can be written"),
    ],
)
def test_bad_arguments_are_named(steps, arguments, message, capsys):
    assert gpu_check.main(["--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_steps_of_this_package_run(tmp_path, capsys):
    """A figure by the real command on a CPU; the others are tried whole in a slow test."""
    assert call(tmp_path, "model", "memcheck") == 0
    found = found_in(tmp_path)
    assert found["model"]["commands"]["pass"]["result"]["model"]["whole pass"]["median"] > 0
    assert found["memcheck"]["status"] == "not here"


@pytest.mark.slow
def test_the_whole_on_a_cpu(tmp_path):
    assert call(tmp_path, "--minutes", "15") == 0
    found = found_in(tmp_path)
    assert {row["status"] for row in found.values()} == {"passed", "not here"}
    smoke = found["smoke"]["commands"]
    least = dict.fromkeys(smoke, 8) | {"library": 1}  # of other packages' kernels torch's own runs on a CPU
    assert all(row["tests"]["passed"] >= least[name] and not row["tests"]["names"] for name, row in smoke.items())


# --- the page ---------------------------------------------------------------------------------------------------------

CARD = figure.Machine("a card", 800.0, 4000.0)


def phases_that_take(factor: float) -> dict:
    """Of `bench model`, where every part takes ``factor`` times its floor."""
    budget, found = figure.chunk_budget(), {"cache: write": {"median": 0.001}}
    for phase, parts in figure.PHASES.items():
        if parts:
            passes = 1 if parts == ("begin_chunk",) else 5
            floor = sum(CARD.milliseconds(budget[part]) for part in parts)
            found[phase] = {"median": factor * floor / 1000 / passes - (0.001 if phase == "attention" else 0)}
    return found


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_the_figure_says_what_must_be_faster(factor):
    lines = figure.table(CARD, phases_that_take(factor))
    floor = sum(CARD.milliseconds(work) for work in figure.chunk_budget().values())
    whole = next(line for line in lines if line.startswith("| **all**")).split(" | ")
    assert float(whole[3]) == pytest.approx(floor, abs=0.5) and float(whole[5]) == pytest.approx(
        factor * floor, abs=0.6
    )
    wanted = 1000 * figure.PICTURES / figure.WANTED_FPS
    last = f"{factor * floor / wanted:.1f} times" if factor * floor > wanted else "is fast enough"
    rows = [line for line in lines[2:] if line.startswith("| ")]
    assert all(row.removesuffix(" |").split(" | ")[-1] == last for row in rows), rows
    assert f"{1000 * figure.PICTURES / (factor * floor):.1f} frames/s" in lines[-1]


def test_a_page_of_a_card(steps):
    """Figures, ratios, what was not timed and why, and the card's own limits."""
    call(steps, "good")
    found = json.loads((steps / "out" / "results.json").read_text())
    stats = {"median": 5e-4, "low": 4e-4, "high": 6e-4}
    row = {"operation": "attention", "case": "paper", "dtype": "bfloat16", "flops": 4e11, "bytes": 1e8}
    timed = {"gate": "green", "seconds": stats, "rounds": 9, "tflops": 800.0, "gbps": 200.0, "percent": 90.0}
    ratio = {"ratios": {"SDPA": {"median": 0.9, "low": 0.8, "high": 1.0}}}
    rows = [
        row | timed | ratio | {"contender": "rfkernels cuda"},
        row | timed | {"contender": "SDPA", "ratios": {"rfkernels cuda": ratio["ratios"]["SDPA"]}},
        row | {"contender": "SDPA cudnn", "skipped": "not served: RuntimeError: No available kernel"},
        row | {"contender": "rfkernels triton", "gate": "red", "skipped": "out is off by 1"},
    ]
    ceilings = {
        "bfloat16": {"TFLOP/s": 800.0, "low": 790.0, "high": 805.0},
        "copy": {"GB/s": 4e3, "low": 3e3, "high": 5e3},
    }
    speed = {"environment": {"gpu": "a card"}, "rows": rows, "ceilings": ceilings}
    model = {"environment": {"preset": figure.PRESET}, "model": phases_that_take(4.0)}
    for step, command, result in (("speed", "bench", speed), ("model", "pass", model)):
        commands = {command: {"argv": [], "status": "passed", "result": result}}
        found["steps"][step] = {"about": "x", "status": "passed", "seconds": 3.0, "commands": commands}
    found["facts"] |= {"name": "a card", "processors": 132}
    page = gpu_page.page(found)
    assert page.startswith("### a card, 132 SMs\n")
    assert (
        "| attention/paper/bfloat16 | rfkernels cuda | 500 us (400 us, 600 us) | 800 | 200 | 90 | 0.90 (0.80, 1.00) |"
        in page
    )
    assert "- SDPA cudnn, in attention/paper/bfloat16: not served: RuntimeError: No available kernel" in page
    assert "- rfkernels triton, in attention/paper/bfloat16: **wrong**: out is off by 1" in page
    assert "| a card at least, ms |" in page and "frames/s." in page
