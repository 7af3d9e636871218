"""Builds a benchmark, passes its contenders through the gate, times those that are right."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from rfkernels.backends import UnservedError

from .cases import CASES, Case, Latent, on_cpu
from .contenders import OURS, Options
from .environment import floor_seconds
from .gate import wrong
from .operations import OPERATIONS
from .timing import Timer, interleaved, ratio, stats, taken

TOO_SLOW = 10  # times the fastest: not worth the time of a whole row

Selection = tuple[str, Case]

# What two CPU cores have time for, by name: the default, and --quick.
ON_CPU = (
    "begin_chunk/half/float32", "begin_chunk/half/bfloat16", "begin_chunk/quarter/float32", "write/half/float32",
    "attention/half/float32", "attention/half/bfloat16", "attention/quarter/float32", "attention/quarter/bfloat16",
    "pass/quarter/float32", "chunk/half/bfloat16", "chunk/quarter/float32", "chunk/quarter/bfloat16",
    "chunk_attention/quarter/float32", "chunk_attention_training/quarter/float32", "sequence/clip-quarter/float32",
    "sequence/llm-1k/float32", "sequence_training/clip-quarter/float32", "redmd/clip-latent/float32",
    "redmd/clip-latent-mask/float32",
)  # fmt: skip
QUICK = (
    "begin_chunk/quarter/float32", "attention/quarter/float32", "chunk/quarter/float32", "redmd/clip-latent/float32",
)  # fmt: skip
COMPILED = ("attention/quarter/float32", "sequence/clip-quarter/float32")  # rows with what compiles for many seconds


def label(operation: str, case: Case) -> str:
    return f"{operation}/{case.name}/{str(case.dtype).removeprefix('torch.')}"


def select(device: torch.device, expression: str | None = None, quick: bool = False) -> list[Selection]:
    """The operations and cases to run. An expression chooses from all; else a CPU gets what it has time for.

    Raises:
        ValueError: an expression that cannot be read, or that chooses nothing.
    """
    on_a_cpu = device.type == "cpu"
    chosen = []
    for operation, (kind, _) in OPERATIONS.items():
        for case in CASES.values():
            if not isinstance(case, kind):
                continue
            case = on_cpu(case) if on_a_cpu else case
            both = on_a_cpu and not isinstance(case, Latent)
            dtypes = (torch.float32, torch.bfloat16) if both else (case.dtype,)
            for dtype in dtypes:
                one = replace(case, dtype=dtype)
                name = label(operation, one)
                if expression is not None:
                    keep = matches(expression, name)
                elif on_a_cpu:
                    keep = name in (QUICK if quick else ON_CPU)
                else:
                    keep = not quick or case.name in ("paper", "clip-latent")
                if keep:
                    chosen.append((operation, one))
    if not chosen:
        raise ValueError(f"-k {expression!r} chooses nothing; names look like {label('attention', CASES['paper'])}")
    return chosen


def matches(expression: str, name: str) -> bool:
    """Whether a name has the words of an expression with and, or, not and parentheses, as in pytest -k.

    Raises:
        ValueError: it cannot be read.
    """
    words = re.findall(r"[()]|[^\s()]+", expression)
    python = [word if word in ("and", "or", "not", "(", ")") else str(word in name) for word in words]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # a word before parentheses: a call, to Python
            return bool(eval(" ".join(python), {"__builtins__": {}}))
    except SyntaxError:
        raise ValueError(f"-k {expression!r} cannot be read: words with and, or, not and parentheses") from None


def measure(
    operation: str,
    case: Case,
    options: Options,
    timer: Timer,
    ceilings: dict,
    seconds: float,
    least: int = 7,
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict]:
    """The rows of one operation on one case: a row for each contender, those that are not timed with the reason."""
    name = label(operation, case)
    progress(f"{name}: inputs and the exact result")
    common = {"operation": operation, "case": case.name, "dtype": name.rsplit("/", 1)[1]}
    if operation in ("begin_chunk", "pass", "chunk"):
        common["layers"] = case.layers
    with torch.no_grad():
        try:
            bench = OPERATIONS[operation][1](case, options)
        except torch.OutOfMemoryError:  # the exact result of a long sequence may need more than a device has
            return [{**common, "contender": "all", "skipped": "not enough memory for the exact result"}]
        common |= {"flops": bench.work.flops, "bytes": bench.work.bytes}
        rows = [{**common, "contender": who, "skipped": why} for who, why in bench.skipped.items()]
        right, spent = {}, {}
        for who, contender in bench.contenders.items():
            progress(f"{name}: {who}")
            try:
                with contender.around():
                    why = wrong(contender.read(contender.call()), bench.exact, bench.plain)
                    if why is None:  # a second call: the first one may have compiled
                        seconds_of = timer.measure(contender.call)
                        timer.end_round()
                        spent[who] = seconds_of()
            except Exception as error:  # must not end the run
                why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                if not who.startswith(OURS) or isinstance(error, UnservedError):
                    rows.append({**common, "contender": who, "skipped": f"not served: {why}"})
                    continue
            if why is not None:
                rows.append({**common, "contender": who, "gate": "red", "skipped": why})
            else:
                right[who] = contender
        if not right:
            return rows
        for who in [who for who in right if spent[who] > max(2 * seconds, TOO_SLOW * min(spent.values()))]:
            del right[who]
            why = f"{spent[who] / min(spent.values()):.0f} times as slow as the fastest"
            rows.append({**common, "contender": who, "gate": "green", "skipped": why})
        progress(f"{name}: {len(right)} in turn")
        calls = {who: contender.call for who, contender in right.items()}
        times = interleaved(calls, timer, seconds, least, {who: c.around for who, c in right.items()})
    floor = floor_seconds(bench.work, case.dtype, ceilings)
    for who in right:
        found = stats(taken(times[who]))
        rows.append(
            common
            | {
                "contender": who,
                "gate": "green",
                "seconds": found._asdict(),
                "rounds": len(taken(times[who])),
                "tflops": bench.work.flops / found.median / 1e12,
                "gbps": bench.work.bytes / found.median / 1e9,
                "percent": 100 * floor / found.median,
                "ratios": {other: ratio(times, who, other)._asdict() for other in right if other != who},
            }
        )
    return rows
