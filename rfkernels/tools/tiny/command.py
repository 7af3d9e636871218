"""``python -m rfkernels train``: every phase of the small model's training, in one command that can be stopped."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ...models import from_pretrained
from ...models.checkpoints import save_weights
from ..outputs import finished, writable_folder
from . import evaluate, phases
from .loop import Log, commit
from .presets import PRESETS, TrainPreset, preset


def _export(preset: TrainPreset, folder: Path) -> None:
    """The Re-DMD student as it is shipped: float16, and the largest matrix in 8 bits, so that it fits 8 MB."""
    model = from_pretrained(folder / "redmd")
    state = {name: tensor.half() for name, tensor in model.state_dict().items()}
    largest = max(state, key=lambda name: state[name].numel())
    save_weights(state | {largest: state[largest].to(torch.float8_e4m3fn)}, model.config, folder / "export")


def _accompany(folder: Path) -> None:
    """Puts beside the exported weights how they came to be and what was measured of them."""
    for source, name in (("run.json", "training.json"), ("evaluation.json", "evaluation.json")):
        if (folder / "export").exists() and (folder / source).exists():
            (folder / "export" / name).write_text((folder / source).read_text())


PHASES: dict[str, Callable[[TrainPreset, Path], float | None]] = {
    "teacher": phases.teacher,
    "trajectories": phases.trajectories,
    "ode": phases.ode,
    "dmd": lambda preset, folder: phases.student(preset, folder, "dmd", 0.0),
    "redmd": lambda preset, folder: phases.student(preset, folder, "redmd", preset.beta),
    "export": _export,
    "evaluate": evaluate.evaluate,
}
# What a phase reads, and so what must have been run.
NEEDS = {
    "trajectories": ("teacher",), "ode": ("teacher", "trajectories"), "dmd": ("teacher", "ode"),
    "redmd": ("teacher", "ode"), "export": ("redmd",), "evaluate": ("ode", "dmd", "export"),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run, left=_left)
    parser.add_argument("--preset", default="tiny", help=f"one of {', '.join(PRESETS)}; default %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a run that was stopped there goes on")
    parser.add_argument("--phase", nargs="+", choices=PHASES, help="default: all of them in order")
    parser.add_argument("--threads", type=int, default=1, help="of torch, default %(default)s")


def _left(args: argparse.Namespace) -> str:
    """What there is when the command was stopped."""
    return f"{args.out} holds what was saved; the same command goes on from there"


def run(args: argparse.Namespace) -> int:
    try:
        chosen = preset(args.preset)
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        import skimage  # noqa: F401

        writable_folder("--out", args.out)
        state = RunState(args.out, args.preset, chosen)
        wanted = args.phase or [name for name in PHASES if name not in state.done]
        for name in wanted:
            missing = [need for need in NEEDS.get(name, ()) if need not in state.done and need not in wanted]
            if missing:
                raise ValueError(f"--phase {name} needs {', '.join(missing)}, which {args.out} does not have yet")
    except ImportError as error:
        print(f'error: training needs {error.name}: pip install "rfkernels[demo]"', file=sys.stderr)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        for name in wanted:
            begin = time.perf_counter()
            started = commit()
            seconds = PHASES[name](chosen, args.out)
            state.finish(name, seconds or time.perf_counter() - begin, started)
            plot(args.out)
            _accompany(args.out)
    finally:
        torch.set_num_threads(before)
    return 0


class RunState:
    """``run.json``: of every finished phase the values, the command, the commit it started from, the seconds."""

    def __init__(self, folder: Path, name: str, chosen: TrainPreset):
        self.path, self.name, self.chosen = folder / "run.json", name, chosen
        held = self._read()
        if held and held["preset"] != name:
            raise ValueError(f"{folder} holds a run of another preset, {held['preset']!r}")
        folder.mkdir(parents=True, exist_ok=True)

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    @property
    def done(self) -> list[str]:
        return list(self._read().get("phases", {}))

    def finish(self, phase: str, seconds: float, started: str) -> None:
        entry = {
            "command": shlex.join(["python", "-m", "rfkernels", *sys.argv[1:]]),
            "commit": started,
            "seconds": round(seconds, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "machine": platform.machine(),
        }
        lines = Log(self.path.parent / phase / "log.jsonl").read()
        if lines:
            entry["last"] = {key: round(value, 6) for key, value in lines[-1].items()}
        entry["values"] = asdict(self.chosen)
        held = self._read() or {"preset": self.name, "phases": {}}
        held["phases"][phase] = entry
        with finished(self.path) as path:  # a run is not to be lost while its record is written
            path.write_text(json.dumps(held, indent=1) + "\n")


def plot(folder: Path) -> None:
    """``loss.png``: what every phase logged; not without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    shown = [
        (name, key)
        for name, keys in {"teacher": ("loss",), "ode": ("loss",), "dmd": ("critic_loss", "reward"),
                           "redmd": ("critic_loss", "reward")}.items()
        for key in keys if Log(folder / name / "log.jsonl").read()
    ]  # fmt: skip
    if not shown:
        return
    figure = Figure(figsize=(4 * len(shown), 3), layout="constrained")
    for axes, (name, key) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        # The student learns, and its reward is measured, in some of the steps only.
        number, values = torch.tensor(
            [(e["step"], e[key]) for e in Log(folder / name / "log.jsonl").read() if key in e]
        ).T
        width = max(1, len(values) // 40)
        axes.plot(number, values, color="0.8", linewidth=0.8)
        whole = len(values) // width * width
        axes.plot(*(x[:whole].unflatten(0, (-1, width)).mean(1) for x in (number, values)), color="tab:blue")
        axes.set(title=f"{name}: {key.replace('_', ' ')}", xlabel="step")
        axes.spines[["top", "right"]].set_visible(False)
        if key == "loss":
            axes.set_yscale("log")
    figure.savefig(folder / "loss.png", dpi=90)
