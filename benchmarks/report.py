"""Rows as tables and as JSON, and two runs side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rfkernels.tools.outputs import finished

from .contenders import FLOOR, OURS

FORMAT = 1
NOISE = 1.05  # a smaller change of a median is not called one


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=i == 0)
    return made


def seconds(value: float) -> str:
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1:
            return f"{value * scale:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def spread(stats: dict, show=lambda x: f"{x:.2f}") -> str:
    return f"{show(stats['median'])} ({show(stats['low'])}, {show(stats['high'])})"


def show_environment(console: Console, environment: dict) -> None:
    for name, value in environment.items():
        console.print(f"{name:18} {value}", highlight=False)


def show_ceilings(console: Console, ceilings: dict, title: str = "What the machine does at most") -> None:
    made = table(title, "", "median", "20 %", "80 %")
    for name, row in ceilings.items():
        unit = next(key for key in row if "/s" in key)
        what = "copy, read and written" if name == "copy" else f"matrix product, {name}"
        made.add_row(f"{what}, {unit}", *(f"{row[key]:.3g}" for key in (unit, "low", "high")))
    console.print(made)


def show_rows(console: Console, rows: list[dict]) -> None:
    """The rows of one operation on one case. Ratios are those of the row to the best of ours, round by round."""
    timed = [row for row in rows if "seconds" in row]
    first = rows[0]
    if "flops" not in first:
        console.print(f"{first['operation']}/{first['case']}/{first['dtype']}: {first['skipped']}", highlight=False)
        return
    layers = f", {first['layers']} layers" if "layers" in first else ""
    work = f"{first['flops'] / 1e9:.3g} GFLOP, {first['bytes'] / 1e6:.3g} MB at least"
    title = f"{first['operation']}/{first['case']}/{first['dtype']}{layers}: {work}"
    ours = [row["contender"] for row in timed if row["contender"].startswith(OURS)]
    best = min(ours, key=lambda who: _row(timed, who)["seconds"]["median"]) if ours else None
    columns = ["", "median", "20 %, 80 %", "TFLOP/s", "GB/s", "% of floor"]
    made = table(title, *columns, f"/ {best}" if best else "ratio", f"/ {FLOOR}")
    for row in sorted(timed, key=lambda row: row["seconds"]["median"]):
        low, high = (seconds(row["seconds"][key]) for key in ("low", "high"))
        ratios = [row["ratios"].get(other) for other in (best, FLOOR)]
        made.add_row(
            row["contender"], seconds(row["seconds"]["median"]), f"{low}, {high}", f"{row['tflops']:.3g}",
            f"{row['gbps']:.3g}", f"{row['percent']:.0f}", *(spread(r) if r else "" for r in ratios),
        )  # fmt: skip
    console.print(made)
    for row in rows:
        if row.get("gate") == "red":
            console.print(f"  [bold red]wrong, not timed[/]: {row['contender']}: {row['skipped']}", highlight=False)
        elif row.get("gate") == "green" and "skipped" in row:
            console.print(f"  not timed: {row['contender']}: {row['skipped']}", highlight=False)


def show_phases(console: Console, phases: dict) -> None:
    whole = phases["whole pass"]["median"]
    made = table("A later pass of the model on a full window", "", "median", "20 %, 80 %", "% of the pass")
    for name, row in phases.items():
        low, high = (seconds(row[key]) for key in ("low", "high"))
        share = "" if name.startswith("cache: begin") else f"{100 * row['median'] / whole:.1f}"
        made.add_row(name, seconds(row["median"]), f"{low}, {high}", share)
    console.print(made)


def show_stream(console: Console, run: dict) -> None:
    title = f"{run['preset']}, {run['layers']} layers, latents {run['latent']}, {run['chunks']} chunks of a full window"
    made = table(title, "a chunk", "median", "20 %, 80 %")
    for name, row in run["parts"].items():
        low, high = (seconds(row[key]) for key in ("low", "high"))
        made.add_row(name, seconds(row["median"]), f"{low}, {high}")
    console.print(made)
    for name, value in run["chunk"].items():
        console.print(f"chunk {name:12} {seconds(value)}", highlight=False)
    for name in ("first-frame latency", "warm-up beyond the steady speed (compilation, first calls)"):
        console.print(f"{name}  {seconds(run[name]) if run[name] > 0 else 'none'}", highlight=False)
    for name in ("frames/s without decoding", "frames/s with decoding"):
        value = f"not timed: {run['decoder']}" if run[name] is None else f"{run[name]:.2f}"
        console.print(f"{name}  {value}", highlight=False)
    console.print(f"peak memory  {run['peak memory'] / 1e6:.0f} MB", highlight=False)


def show_skipped(console: Console, rows: list[dict]) -> None:
    """Each contender that is in no row, once."""
    there = {row["contender"] for row in rows if "seconds" in row}
    missing = [row for row in rows if "skipped" in row and "gate" not in row and row["contender"] not in there]
    reasons = {row["contender"]: row["skipped"] for row in missing}
    if reasons:
        console.print("Not here:", highlight=False)
        for who, why in reasons.items():
            console.print(f"  {who}: {why}", highlight=False)


def _row(rows: list[dict], contender: str) -> dict:
    return next(row for row in rows if row["contender"] == contender)


def save(path: str | Path, run: dict) -> None:
    with finished(Path(path)) as partial:
        partial.write_text(json.dumps({"format": FORMAT} | run, indent=1) + "\n")


def load(path: str | Path) -> dict:
    """A saved run.

    Raises:
        ValueError: not a file that `save` wrote.
    """
    try:
        run = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(run, dict) or run.get("format") != FORMAT or "rows" not in run:
        raise ValueError(f"{path} is not a run saved by bench --json (format {FORMAT})")
    return run


def compare(a: dict, b: dict) -> list[dict]:
    """Rows of two runs side by side. A change counts where the medians differ by more than 5 % and the ranges from the
    20 to the 80 % quantile do not meet. Beside the times stands the ratio to SDPA (where it was timed), which a machine
    that is slower as a whole does not move."""

    def timed(run):
        keys = ("operation", "case", "dtype", "contender")
        return {tuple(row[key] for key in keys): row for row in run["rows"] if "seconds" in row}

    rows, (old, new) = [], (timed(a), timed(b))
    for key in [*old, *(key for key in new if key not in old)]:
        row = {"name": "/".join(key[:3]), "contender": key[3]}
        if key not in new or key not in old:
            rows.append(row | {"change": "only in the first" if key in old else "only in the second"})
            continue
        x, y = old[key], new[key]
        row |= {"first": x["seconds"], "second": y["seconds"]}
        row["ratio"] = y["seconds"]["median"] / x["seconds"]["median"]
        row["to_floor"] = [r["ratios"].get(FLOOR, {}).get("median") for r in (x, y)]
        apart = y["seconds"]["low"] > x["seconds"]["high"] or y["seconds"]["high"] < x["seconds"]["low"]
        row["change"] = "same"
        if apart and not 1 / NOISE <= row["ratio"] <= NOISE:
            row["change"] = "slower" if row["ratio"] > 1 else "faster"
        rows.append(row)
    return rows


def show_comparison(console: Console, a: dict, b: dict) -> None:
    for name in sorted(set(a["environment"]) | set(b["environment"])):
        x, y = (run["environment"].get(name) for run in (a, b))
        if x != y:
            console.print(f"{name:18} {x}  ->  {y}", highlight=False)
    rows = compare(a, b)
    made = table("second / first", "", "contender", "first", "second", "ratio", f"/ {FLOOR}, first, second", "change")
    colours = {"slower": "bold red", "faster": "bold green"}
    for row in rows:
        if "ratio" not in row:
            made.add_row(row["name"], row["contender"], "", "", "", "", row["change"])
            continue
        floors = ", ".join("-" if x is None else f"{x:.2f}" for x in row["to_floor"])
        change = row["change"]
        made.add_row(
            row["name"], row["contender"], seconds(row["first"]["median"]), seconds(row["second"]["median"]),
            f"{row['ratio']:.3f}", floors, f"[{colours[change]}]{change}[/]" if change in colours else change,
        )  # fmt: skip
    console.print(made)
    counts = [f"{sum(row['change'] == kind for row in rows)} {kind}" for kind in ("slower", "faster", "same")]
    console.print(", ".join(counts), highlight=False)


def markdown(run: dict) -> str:
    """The rows of a run as a table of ratios: the best backend of ours to SDPA, and every other contender to it."""
    groups: dict[tuple, dict[str, dict]] = {}
    for row in run["rows"]:
        if "seconds" in row:
            groups.setdefault((row["operation"], row["case"], row["dtype"]), {})[row["contender"]] = row
    lines = [f"| row | ours / {FLOOR} | others / ours | ours | % of floor |", "|---|---|---|---|---|"]
    for key, found in groups.items():
        ours = [who for who in found if who.startswith(OURS)]
        if not ours:
            continue
        best = min(ours, key=lambda who, found=found: found[who]["seconds"]["median"])
        row = found[best]
        peers = [
            f"{who} {spread(other['ratios'][best])}"
            for who, other in found.items()
            if who not in (best, FLOOR, OURS + "reference")
        ]
        floor = spread(row["ratios"][FLOOR]) if FLOOR in found else ""
        cells = ["/".join(key), floor, "; ".join(peers), seconds(row["seconds"]["median"]), f"{row['percent']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown(load(sys.argv[1])))
