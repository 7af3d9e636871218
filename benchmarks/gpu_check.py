"""One command for the first minutes on a GPU: ``make gpu-check`` or ``PYTHONPATH=. python -m benchmarks.gpu_check``.

Needs the source tree, and neither network nor installation. Steps (gpu_steps.py) run in the order in which they matter,
each in processes of its own and for a bounded time, until the budget ends. What is found lies in the folder at once:
``results.json``, ``log.txt`` and ``page.md``; called again with the same folder, it goes on with what is left.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

from rfkernels.tools.outputs import finished, writable_folder

from . import gpu_page, gpu_steps
from .gpu_steps import Step

ROOT = Path(__file__).parents[1]
FORMAT = 1
LEAST = 10.0  # seconds: with less left, a step is not begun
PATIENCE = 5.0  # seconds that a command has to end after it was asked to
DONE = ("passed", "failed", "timed out")  # in an earlier call with the same folder; a kernel that hangs does so again
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
TEST = re.compile(r"tests/\S+::\S+")

FACTS = """
import json, torch, rfkernels as rf
from rfkernels.backends import cuda
device = torch.device("{device}")
facts = {{"torch": torch.__version__, "cuda": torch.version.cuda, "library": cuda.unavailable(device)}}
if device.type == "cuda":
    gpu = torch.cuda.get_device_properties(device)
    facts |= {{"name": gpu.name, "capability": [gpu.major, gpu.minor], "processors": gpu.multi_processor_count}}
print(json.dumps(facts))
"""


def outcomes(lines: list[str]) -> dict[str, object] | None:
    """What ``pytest -v`` said of its tests, as far as it came; None where it said nothing. With and without xdist."""
    found: dict[str, list[str]] = {}
    for line in lines:
        test, outcome = TEST.search(line), OUTCOME.search(line)
        if test and outcome and not line.startswith(("FAILED", "ERROR", "SKIPPED")):  # those are of its summary
            found.setdefault(outcome[1].lower(), []).append(test[0])
    if not found:
        return None
    return {name: len(tests) for name, tests in found.items()} | {
        "names": [test for name in ("failed", "error") for test in found.get(name, ())]
    }


class Results:
    """results.json, written whole after each change, and the page made of it."""

    def __init__(self, folder: Path, about: dict[str, object]):
        self.folder, self.path = folder, folder / "results.json"
        earlier = json.loads(self.path.read_text()) if self.path.exists() else {"steps": {}}
        if earlier.get("format", FORMAT) != FORMAT:
            raise ValueError(f"--out {folder} holds results of another format: {earlier['format']}")
        self.found: dict = {"format": FORMAT, **about, "steps": earlier["steps"]}

    def status(self, step: str) -> str | None:
        return self.found["steps"].get(step, {}).get("status")

    def set(self, step: str, row: dict) -> None:
        self.found["steps"][step] = row
        with finished(self.path) as partial:
            partial.write_text(json.dumps(self.found, indent=1) + "\n")
        with finished(self.folder / "page.md") as partial:
            partial.write_text(gpu_page.page(self.found))


class Command:
    """One process group, whose lines go to the log as they come."""

    def __init__(self, name: str, argv: list[str], environment: dict[str, str], say: Callable[[str], None]):
        self.name, self.argv, self.lines = name, argv, []
        self.process = subprocess.Popen(
            argv, cwd=ROOT, env=os.environ | environment, start_new_session=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.reader = threading.Thread(target=self._read, args=(say,), daemon=True)
        self.reader.start()

    def _read(self, say: Callable[[str], None]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            say(f"[{self.name}] {self.lines[-1]}")

    def wait(self, end: float) -> bool:
        """Whether it ended by itself before that moment; else it is stopped."""
        try:
            self.process.wait(max(0.0, end - time.monotonic()))
            return True
        except subprocess.TimeoutExpired:
            return False
        finally:
            self.stop()

    def stop(self) -> None:
        """Also what the process has left running. pytest ends with its summary when it is interrupted."""
        for kind in (signal.SIGINT, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, kind)
                self.process.wait(PATIENCE)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self.reader.join(PATIENCE)


class Check:
    def __init__(self, results: Results, log, end: float):
        self.results, self._log, self.end = results, log, end
        self._lock = threading.Lock()

    def say(self, text: str) -> None:
        with self._lock:
            self._log.write(text + "\n")
            self._log.flush()

    def run(self, step: Step) -> str:
        """Runs a step and writes what it found; returns its status."""
        left = self.end - time.monotonic()
        row: dict = {"about": step.about, "decides": step.decides}
        reason = step.missing()
        if reason is not None:
            row |= {"status": "not here", "reason": reason}
        elif left < LEAST:
            row |= {"status": "no time left"}
        else:
            self.results.set(step.name, row | {"status": "running"})
            started = time.monotonic()
            row |= self._run(step, started + min(step.limit, left), "timed out" if step.limit <= left else "stopped")
            row["seconds"] = round(time.monotonic() - started, 1)
        self.results.set(step.name, row)
        return row["status"]

    def _run(self, step: Step, end: float, late: str) -> dict:
        """late: the status of what has not ended by then."""
        running: dict[str, tuple[Command, Path]] = {}
        ended: dict[str, bool] = {}
        try:
            for name, parts in step.commands.items():
                result = self.results.folder / f"partial-{step.name}-{name}.json"
                result.unlink(missing_ok=True)
                argv = [str(result) if part == gpu_steps.RESULT else part for part in parts]
                self.say(f"[{step.name}/{name}] $ {' '.join(argv)}")
                running[name] = Command(f"{step.name}/{name}", argv, step.environment, self.say), result
            for name, (command, _) in running.items():
                ended[name] = command.wait(end)
        finally:  # also where the check itself is interrupted
            for command, _ in running.values():
                command.stop()
        rows = {}
        for name, (command, result) in running.items():
            rows[name] = self._row(command, result, None if ended[name] else late)
        statuses = {row["status"] for row in rows.values()}
        status = next((s for s in ("failed", "timed out", "stopped") if s in statuses), "passed")
        return {"status": status, "commands": rows}

    @staticmethod
    def _row(command: Command, result: Path, late: str | None) -> dict:
        code, tests = command.process.returncode, outcomes(command.lines)
        failed = bool(tests and tests["names"]) or (late is None and code != 0)
        row: dict = {"argv": command.argv, "status": "failed" if failed else late or "passed"}
        row |= {} if late else {"code": code}
        if tests:
            row["tests"] = tests
        if result.exists():
            row["result"] = json.loads(result.read_text())
            result.unlink()
        elif not tests:
            row["output"] = command.lines[-200:]
        return row


def facts(device: str) -> dict:
    """What decides which steps can run, asked in a process of its own: this one leaves the GPU alone.

    Raises:
        ValueError: rfkernels or the device does not work at all.
    """
    code = FACTS.format(device=device)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"--device {device} cannot be used:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def steps_of(device: str, known: dict) -> list[Step]:
    if device == "cpu":
        return list(gpu_steps.on_cpu())

    def library() -> str | None:
        if known["library"] is None:
            return "it loads, with kernels for this GPU"
        absent = [name for name in ("nvcc", "cmake", "ninja") if gpu_steps.tool(name) is None]
        return f"{known['library']}; to build it: {', '.join(absent)} missing" if absent else None

    major, minor = known["capability"]
    return list(gpu_steps.on_gpu(f"{major}.{minor}" + ("a" if major == 9 else ""), library))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description="Checks and measures the kernels on a GPU, in a given time."
    )
    made.add_argument(
        "steps", nargs="*", help="only these, also where they have run before (default: all that are left)"
    )
    made.add_argument("--minutes", type=float, default=8.0, help="the whole time (default 8)")
    made.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder of the results (default gpu_check)")
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial run, kernels emulated")
    made.add_argument("--list", action="store_true", help="only print the steps")
    return made


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        return run(args)
    except ValueError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * args.minutes
    if not args.minutes > 0:
        raise ValueError(f"--minutes must be positive, got {args.minutes}")
    known = facts(args.device)
    steps = steps_of(args.device, known)
    names = [step.name for step in steps]
    if unknown := set(args.steps) - set(names):
        raise ValueError(f"steps must be among {', '.join(names)}, got {', '.join(sorted(unknown))}")
    if args.list:
        print("\n".join(f"{step.name:10} {step.limit:4.0f} s  {step.about}" for step in steps))
        return 0
    writable_folder("--out", args.out)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    about = {
        "device": args.device, "facts": known, "commit": commit.stdout.strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "minutes": args.minutes,
    }  # fmt: skip
    results = Results(args.out.resolve(), about)
    chosen = [s for s in steps if (s.name in args.steps if args.steps else results.status(s.name) not in DONE)]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: commands are stopped
    with (results.folder / "log.txt").open("a") as log:
        check = Check(results, log, end)
        for step in chosen:
            status = check.run(step)
            print(f"{step.name:10} {gpu_page.summary(results.found['steps'][step.name])}", flush=True)
            if step.name == "library" and status == "passed":
                known |= facts(args.device)
                results.found["facts"] = known
    print(f"{results.folder / 'page.md'}, results.json, log.txt")
    rows = results.found["steps"].values()
    return 1 if any(row["decides"] and row["status"] in ("failed", "timed out") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
