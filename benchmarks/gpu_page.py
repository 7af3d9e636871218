"""The results of `make gpu-check` as a page of markdown, which benchmarks/README.md takes in between its marks."""

from __future__ import annotations

from . import figure
from .contenders import FLOOR
from .report import markdown, seconds, spread


def summary(row: dict) -> str:
    """One line: what became of a step."""
    text = row["status"] + (f" in {row['seconds']:.0f} s" if "seconds" in row else "")
    parts = []
    for name, command in row.get("commands", {}).items():
        tests = command.get("tests")
        if tests:
            counts = ", ".join(
                f"{tests[kind]} {kind}" for kind in ("passed", "failed", "error", "skipped") if kind in tests
            )
            parts.append(f"{name}: {counts}")
        elif command["status"] != "passed":
            parts.append(f"{name}: {command['status']}" + (f", exit {command['code']}" if "code" in command else ""))
    parts += [row["reason"]] if "reason" in row else []
    return text + (f" ({'; '.join(parts)})" if parts else "")


def result(found: dict, step: str, command: str) -> dict | None:
    """What a command left as its figures, if it came to that."""
    return found["steps"].get(step, {}).get("commands", {}).get(command, {}).get("result")


def page(found: dict) -> str:
    facts = found["facts"]
    card = f"{facts['name']}, {facts['processors']} SMs" if "name" in facts else "a CPU in place of a GPU"
    lines = [
        f"### {card}",
        "",
        f"By `python -m benchmarks.gpu_check` at commit {found['commit']}, {found['date']}; torch {facts['torch']}, "
        f"CUDA {facts['cuda']}.",
        "",
        "| step | | |",
        "|---|---|---|",
    ]
    for name, row in found["steps"].items():
        lines.append(f"| {name} | {row['about']} | {summary(row)} |")
    lines += _failures(found)
    for title, step in (("A streaming pass of one layer", "speed"), ("Other operations", "bench")):
        if run := result(found, step, "bench"):
            lines += ["", f"**{title}**", "", *_ceilings(run), "", *_rows(run)]
            if step == "bench":
                lines += ["", markdown(run)]
    lines += _model(found)
    return "\n".join(lines) + "\n"


def _failures(found: dict) -> list[str]:
    lines = []
    for step, row in found["steps"].items():
        for name, command in row.get("commands", {}).items():
            if command["status"] not in ("failed", "timed out"):
                continue
            tests = command.get("tests", {}).get("names", [])
            last = tests or [line for line in command.get("output", []) if line.strip()][-3:]
            lines.append(f"- {step}, {name}: {command['status']}")
            lines += [f"  - `{text}`" for text in last[:20]]
    return ["", *lines] if lines else []


def _ceilings(run: dict) -> list[str]:
    parts = []
    for name, row in run["ceilings"].items():
        unit = next(key for key in row if "/s" in key)
        what = "a copy" if name == "copy" else f"a product of {name} matrices"
        parts.append(f"{what} {row[unit]:.4g} {unit} ({row['low']:.4g}, {row['high']:.4g})")
    return [f"Measured ceilings (20 and 80 % quantiles): {'; '.join(parts)}."]


def _rows(run: dict) -> list[str]:
    """Every contender that was timed, and those that were not with the reason."""
    lines = [
        f"| row | contender | median (20 %, 80 %) | TFLOP/s | GB/s | % of floor | / {FLOOR} |",
        "|---|---|---|---|---|---|---|",
    ]
    rest: dict[tuple[str, str], list[str]] = {}
    for row in run["rows"]:
        name = "/".join(row[key] for key in ("operation", "case", "dtype"))
        if "seconds" not in row:
            reason = ("**wrong**: " if row.get("gate") == "red" else "") + row["skipped"]
            rest.setdefault((row["contender"], reason), []).append(name)
            continue
        ratio = row["ratios"].get(FLOOR)
        took, rates = spread(row["seconds"], seconds), f"{row['tflops']:.3g} | {row['gbps']:.3g} | {row['percent']:.0f}"
        lines.append(f"| {name} | {row['contender']} | {took} | {rates} | {spread(ratio) if ratio else ''} |")
    said = [f"- {who}, in {', '.join(names)}: {reason}" for (who, reason), names in rest.items()]
    return lines + (["", "Not timed:", "", *said] if said else [])


def _model(found: dict) -> list[str]:
    lines: list[str] = []
    streams = {step: run["e2e"] for step in found["steps"] if (run := result(found, step, "stream"))}
    if streams:
        lines += [
            "",
            "**The model**, with random weights: neither the published weights nor their decoder. Published are "
            f"{figure.PUBLISHED_FPS} frames/s on one H100.",
            "",
            "| stream | a chunk, p50 | frames/s without decoding | with decoding | first frames | peak memory |",
            "|---|---|---|---|---|---|",
        ]
        for name, run in streams.items():
            decoded = run["frames/s with decoding"]
            lines.append(
                f"| {run['preset']}, {name.removeprefix('e2e-')} | {seconds(run['chunk']['p50'])} | "
                f"{run['frames/s without decoding']:.2f} | {f'{decoded:.2f}' if decoded else run['decoder']} | "
                f"{seconds(run['first-frame latency'])} | {run['peak memory'] / 1e9:.1f} GB |"
            )
    model, speed = result(found, "model", "pass"), result(found, "speed", "bench")
    if model and speed and model["environment"].get("preset") == figure.PRESET:
        lines += ["", *figure.table(figure.Machine.measured(speed), model["model"])]
    return lines
