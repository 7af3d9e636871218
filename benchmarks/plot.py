"""A picture of a run: every row as a bar beside its peers, and all rows under the machine's roof."""

from __future__ import annotations

from pathlib import Path

from .contenders import OURS


def plot(run: dict, path: str | Path) -> None:
    """Writes a PNG. Bars are ratios to the best backend of ours in the same rounds; the roof is the measured one."""
    from matplotlib.figure import Figure

    groups: dict[str, list[dict]] = {}
    for row in run["rows"]:
        if "seconds" in row:
            groups.setdefault(f"{row['operation']}/{row['case']}/{row['dtype']}", []).append(row)
    count = sum(len(rows) for rows in groups.values()) + len(groups)
    figure = Figure(figsize=(15, max(4.0, 0.22 * count)), layout="constrained")
    bars, roof = figure.subplots(1, 2)
    names, y = [], 0
    for group, rows in groups.items():
        ours = [row for row in rows if row["contender"].startswith(OURS)]
        best = min(ours or rows, key=lambda row: row["seconds"]["median"])["contender"]
        names.append((y, group))
        y += 1
        for row in sorted(rows, key=lambda row: row["seconds"]["median"]):
            stats = row["ratios"].get(best, {"median": 1.0, "low": 1.0, "high": 1.0})
            around = [[stats["median"] - stats["low"]], [stats["high"] - stats["median"]]]
            colour = "tab:blue" if row["contender"].startswith(OURS) else "tab:gray"
            bars.barh(y, stats["median"], xerr=around, color=colour, error_kw={"lw": 1})
            names.append((y, row["contender"]))
            y += 1
    bars.set_yticks([at for at, _ in names], [name for _, name in names], fontsize=7)
    bars.axvline(1, color="black", lw=0.5)
    bars.set(xlabel="time / best of rfkernels", xscale="log")
    bars.invert_yaxis()

    bandwidth = run["ceilings"]["copy"]["GB/s"] / 1e3
    for name, ceiling in run["ceilings"].items():
        if name != "copy":
            rate = ceiling["TFLOP/s"]
            corner = rate / bandwidth
            roof.plot([corner / 1e3, corner, corner * 1e3], [rate / 1e3, rate, rate], lw=1, label=f"roof, {name}")
    for group, rows in groups.items():
        for row in rows:
            if row["contender"].startswith(OURS):
                roof.scatter(row["flops"] / row["bytes"], row["tflops"], s=14, color="tab:blue")
                roof.annotate(group, (row["flops"] / row["bytes"], row["tflops"]), fontsize=5)
    roof.set(xscale="log", yscale="log", xlabel="FLOP per byte that must be moved", ylabel="TFLOP/s")
    roof.legend(fontsize=7)
    where = run["environment"]
    machine = where.get("gpu") or where["cpu"]
    figure.suptitle(f"rfkernels {where['commit']}, {machine}, torch {where['torch']}", fontsize=9)
    figure.savefig(path, dpi=120)
