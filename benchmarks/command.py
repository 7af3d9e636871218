"""``python -m rfkernels bench``: how fast each operation is here, beside what one would use instead."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

DESCRIPTION = (
    "how fast each operation is on this machine, beside what one would use instead, and how far it is from its limit"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "what", nargs="?", choices=("operations", "model", "e2e"), default="operations",
        help="each operation beside its peers (default); a model pass by phase; a stream from text to pictures",
    )  # fmt: skip
    parser.add_argument("-k", metavar="EXPR", help="rows whose names have these words, with and, or, not: any case")
    parser.add_argument("--quick", action="store_true", help="a few rows, under a minute on two cores")
    parser.add_argument("--list", action="store_true", help="only print the names of the rows")
    parser.add_argument("--seconds", type=float, help="of timing for each row (default 2, quick 1)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="on a GPU, time replays of captured graphs (e2e: passes)"
    )
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--keep-memory", action="store_true", help="tell glibc to keep freed memory (see the README)")
    parser.add_argument("--no-compile", action="store_true", help="leave out what compiles for many seconds")
    parser.add_argument("--json", metavar="PATH", help="save the run")
    parser.add_argument("--plot", metavar="PATH", help="save bars and a roofline as PNG (needs matplotlib)")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="print two saved runs side by side")
    parser.add_argument("--preset", help="model, e2e: sizes; default tiny on a CPU, wan2.1-t2v-1.3b on a GPU")
    parser.add_argument("--chunks", type=int, default=20, help="e2e: chunks to time")
    parser.add_argument("--compile", action="store_true", help="e2e: torch.compile the model")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    try:
        import rich  # noqa: F401
    except ImportError:
        print("bench prints its tables with rich: pip install 'rfkernels[bench]'", file=sys.stderr)
        return 1
    try:
        return _run(args)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch
    from rich.console import Console

    from rfkernels.tools.outputs import writable_file

    from . import report, runner
    from .contenders import Options
    from .environment import ceilings, environment
    from .timing import keep_memory, make_timer

    # In a file or a pipe lines may be as long as the table.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    if args.compare:
        report.show_comparison(console, *(report.load(path) for path in args.compare))
        return 0
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {args.seconds}")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads must be at least 1, got {args.threads}")
        torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no CUDA device")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path:
            writable_file(option, Path(path))
    if args.plot:
        _require_matplotlib()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.what != "operations":
        return _run_model(args, console, device)
    chosen = runner.select(device, args.k, args.quick)
    if args.list:
        for operation, case in chosen:
            print(runner.label(operation, case))
        return 0
    if args.keep_memory:
        keep_memory()
    torch.manual_seed(0)
    timer = make_timer(device, args.cuda_graph)
    settings = {"keep memory": args.keep_memory, "CUDA graph": args.cuda_graph and device.type == "cuda"}
    found = {"environment": environment(device, **settings), "rows": []}
    report.show_environment(console, found["environment"])
    with console.status("ceilings of the machine") as status:
        found["ceilings"] = ceilings(device, timer)
    report.show_ceilings(console, found["ceilings"])
    if device.type == "cpu" and args.k is None:
        console.print(
            "Rows that two cores have time for, with fewer layers than a model has; -k runs any.", highlight=False
        )
    for i, (operation, case) in enumerate(chosen):
        name = runner.label(operation, case)
        all_rows = args.k is not None or device.type == "cuda" or name in runner.COMPILED
        options = Options(device, compiled=all_rows and not (args.quick or args.no_compile))
        with console.status("") as status:
            rows = runner.measure(
                operation, case, options, timer, found["ceilings"], args.seconds or (1.0 if args.quick else 2.0),
                progress=lambda text, i=i, status=status: status.update(f"{i + 1}/{len(chosen)} {text}"),
            )  # fmt: skip
        report.show_rows(console, rows)
        found["rows"] += rows
        if args.json:  # after each row: a run that is stopped has what it measured
            report.save(args.json, found)
    report.show_skipped(console, found["rows"])
    found["ceilings at the end"] = ceilings(device, timer)
    report.show_ceilings(console, found["ceilings at the end"], "The same, at the end: how steady the machine was")
    if args.json:
        report.save(args.json, found)
    if args.plot:
        from .plot import plot

        plot(found, args.plot)
    return 1 if any(row.get("gate") == "red" for row in found["rows"]) else 0


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("--plot needs matplotlib: pip install 'rfkernels[bench]'") from None


def _run_model(args: argparse.Namespace, console, device) -> int:
    from rfkernels.models.config import PRESETS

    from . import model, report
    from .environment import environment
    from .timing import make_timer

    preset = args.preset or ("tiny" if device.type == "cpu" else "wan2.1-t2v-1.3b")
    if preset not in PRESETS:
        raise ValueError(f"--preset must be one of {sorted(PRESETS)}, got {preset!r}")
    if args.chunks < 1:
        raise ValueError(f"--chunks must be at least 1, got {args.chunks}")
    if args.cuda_graph and (args.what, device.type) != ("e2e", "cuda"):
        raise ValueError(f"--cuda-graph is for operations, and for e2e on a GPU, got {args.what} on {device.type}")
    found = {"environment": environment(device, preset=preset), "rows": []}
    report.show_environment(console, found["environment"])
    timer = make_timer(device)
    with console.status(f"{args.what}: {preset}"):
        if args.what == "model":
            found["model"] = model.phases(preset, device, timer)
        else:
            chunks = 4 if args.quick else args.chunks
            found["e2e"] = model.end_to_end(preset, device, timer, chunks, args.compile, args.cuda_graph)
    (report.show_phases if args.what == "model" else report.show_stream)(console, found[args.what])
    if args.json:
        report.save(args.json, found)
    return 0
