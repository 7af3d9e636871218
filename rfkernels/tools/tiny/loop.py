"""A training loop that can be stopped at any step and goes on bit for bit: what is drawn depends on the step alone."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ...training import ReDMDTrainer, load_trainer, save_trainer
from ...training.checkpoint import recover


def commit() -> str:
    """Of the checkout these sources are in, or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def bfloat16_products() -> Iterator[None]:
    """Products of bfloat16, added up in float32, where the CPU has them: faster, and as good for training."""
    mkldnn: Any = torch.backends.mkldnn  # which gets its attributes at run time
    matmul = mkldnn.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class Log:
    """``log.jsonl`` of a phase: a line a step."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Drops what a run that was stopped had written after its last checkpoint."""
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if json.loads(line)["step"] < step]
            self.path.write_text("".join(line + "\n" for line in lines))

    def write(self, **entry: float) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


class State:
    """What a phase changes, modules and optimisers, as one file."""

    def __init__(self, *parts: torch.nn.Module | torch.optim.Optimizer):
        self.parts = parts

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        partial = path.with_suffix(".partial")
        torch.save({"parts": [part.state_dict() for part in self.parts], "extra": extra}, partial)
        os.replace(partial, path)

    def load(self, path: Path) -> dict[str, Any]:
        held = torch.load(path, weights_only=True)
        for part, values in zip(self.parts, held["parts"], strict=True):
            part.load_state_dict(values)
        return held["extra"]


class TrainerState:
    """The same of a `ReDMDTrainer`, as a folder."""

    def __init__(self, trainer: ReDMDTrainer):
        self.trainer = trainer

    def save(self, path: Path, extra: dict[str, Any]) -> None:
        save_trainer(self.trainer, path, extra)

    def load(self, path: Path) -> dict[str, Any]:
        return load_trainer(self.trainer, path)


@bfloat16_products()
def train(
    folder: Path,
    steps: int,
    step: Callable[[int], dict[str, float]],
    state: State | TrainerState,
    save_every: int,
    report: Callable[[str], None] = print,
    stop_after: int | None = None,
) -> float | None:
    """Runs ``step(number)`` for every number below ``steps`` that has not been run yet.

    Args:
        folder: gets ``log.jsonl`` and ``state``, from which a later call goes on.
        step: one step, a function of its number and of ``state`` alone; returns what is logged.
        stop_after: steps after which this call returns, for tests of resumption.

    Returns:
        the seconds that all the steps took, over all calls; None if stopped before the end.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log, checkpoint = Log(folder / "log.jsonl"), folder / "state"
    first, seconds = 0, 0.0
    recover(checkpoint)
    if checkpoint.exists():
        extra = state.load(checkpoint)
        first, seconds = extra["step"], extra["seconds"]
    log.rewind(first)
    begin = time.perf_counter() - seconds
    for number in range(first, steps):
        if stop_after is not None and number - first == stop_after:
            return None
        values = step(number)
        seconds = time.perf_counter() - begin
        log.write(step=number, seconds=round(seconds, 2), **values)
        if (number + 1) % save_every == 0 or number + 1 == steps:
            state.save(checkpoint, {"step": number + 1, "seconds": seconds})
            shown = ", ".join(f"{name} {value:.4g}" for name, value in values.items())
            report(f"{folder.name}: step {number + 1} of {steps}, {shown}, {seconds:.0f} s")
    return seconds
