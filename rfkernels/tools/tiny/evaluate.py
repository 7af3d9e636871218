"""The comparison in docs/tiny.md: DMD against Re-DMD, and the sinks, at two lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import clips, streams
from .presets import TrainPreset

METRICS = ("motion", "flicker", "drift", "sharpness", "fidelity")


def cases(folder: Path) -> list[tuple[str, Path, streams.Sink]]:
    """Name, weights and sink of what is compared: the Re-DMD student as it is shipped."""
    trained = next(sink for sink in streams.SINKS if sink.name == "EMA 0.99")
    found = [(f"Re-DMD, {sink.name}", folder / "export", sink) for sink in streams.SINKS]
    return [
        *found,
        (f"DMD, {trained.name}", folder / "dmd", trained),
        (f"ODE student, {trained.name}", folder / "ode", trained),
    ]


def evaluate(preset: TrainPreset, folder: Path, report: Callable[[str], None] = print) -> None:
    """Streams every case and leaves ``evaluation.json`` (a number a stream) and ``evaluation.md`` in ``folder``."""
    conditions = streams.moving_conditions(preset.evaluation_streams)
    lengths = [round(seconds * streams.FRAMES_PER_SECOND) for seconds in preset.evaluation_seconds]
    rows = {"real clips": _measured(streams.real(conditions, max(lengths)), conditions, lengths)}
    for name, weights, sink in cases(folder):
        made = streams.stream(streams.load(weights), conditions, max(lengths), sink)
        rows[name] = _measured(made.frames, conditions, lengths)
        moved = streams.summary(torch.tensor(rows[name][str(max(lengths))]["motion"]))
        report(f"evaluate: {name}, motion {moved[0]:.3f} +- {moved[1]:.3f}, {made.seconds:.0f} s")
    named = {"conditions": [c.name for c in conditions], "frames": lengths, "rows": rows}
    (folder / "evaluation.json").write_text(json.dumps(named, indent=1) + "\n")
    (folder / "evaluation.md").write_text(table(named))


def _measured(
    frames: torch.Tensor, conditions: Sequence[clips.Condition], lengths: list[int]
) -> dict[str, dict[str, list[float]]]:
    found = {}
    for length in lengths:
        values = streams.measure(frames[:, :length], conditions, max(2, min(length // 4, 24)))
        found[str(length)] = {name: [round(v, 5) for v in values[name].tolist()] for name in METRICS}
    return found


def table(evaluation: dict) -> str:
    """Markdown, a table for each length: mean and standard error; a star where a paired difference from the Re-DMD
    student with the sink it was trained with exceeds two standard errors."""
    text = []
    for length in map(str, evaluation["frames"]):
        seconds = int(length) / streams.FRAMES_PER_SECOND
        text += [f"{seconds:g} s ({length} latent frames), {len(evaluation['conditions'])} streams", ""]
        text += ["| | " + " | ".join(METRICS) + " |", "|---" * (1 + len(METRICS)) + "|"]
        base = evaluation["rows"]["Re-DMD, EMA 0.99"][length]
        for name, values in evaluation["rows"].items():
            cells = []
            for metric in METRICS:
                own, other = torch.tensor(values[length][metric]), torch.tensor(base[metric])
                mean, error = streams.summary(own)
                cells.append(f"{mean:.3f} ± {error:.3f}" + (" *" if streams.differ(own, other) else ""))
            text.append(f"| {name} | " + " | ".join(cells) + " |")
        text.append("")
    return "\n".join(text)
