"""What the Triton kernels execute, counted by the PTX emulator: ``python -m benchmarks.emulated``. Needs tests/.

The operations run at a small shape as compiled for sm_80 and sm_90. Bytes are those that the instructions ask for,
before any cache, beside the least bytes of the case: a kernel that reads its inputs once has a ratio near 1, attention
reads keys once for each tile of queries.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch

from .cases import Latent, Stream
from .contenders import OURS, Options
from .operations import OPERATIONS

TESTS = Path(__file__).parents[1] / "tests"
CASES = {
    "begin_chunk": Stream("small", rows=8, columns=16, frames=3, heads=2, kv_heads=2, layers=2),
    "write": Stream("small", rows=8, columns=16, frames=3, heads=2, kv_heads=2),
    "attention": Stream("small", rows=8, columns=16, frames=3, heads=2, kv_heads=2),
    "redmd": Latent("small", (1, 3, 16, 16, 32)),
}


def measure(operation: str, arch: int) -> dict[str, dict]:
    """By kernel: launches, warp instructions by class, bytes loaded and stored, bank conflicts.

    Raises:
        AssertionError: the kernels' result is wrong.
    """
    if str(TESTS) not in sys.path:
        sys.path.insert(0, str(TESTS))
    from emulated import on_emulator
    from ptx import emulator

    from .gate import wrong

    found: dict[str, dict] = defaultdict(lambda: defaultdict(int))
    launch, counting = emulator.Module.launch, [False]

    def counted(self, name, *args, **kwargs):
        result = launch(self, name, *args, **kwargs)
        if counting[0]:
            row = found[name]
            row["launches"] += 1
            row["loaded"] += result.global_load_bytes
            row["stored"] += result.global_store_bytes
            row["conflicts"] += result.bank_conflicts
            for kind, count in result.by_class().items():
                row[kind] += count
        return result

    with on_emulator(arch), mock.patch.object(emulator.Module, "launch", counted), torch.no_grad():
        bench = OPERATIONS[operation][1](CASES[operation], Options(torch.device("cpu"), compiled=False))
        it = bench.contenders[OURS + "triton"]
        with it.around():
            counting[0] = True
            result = it.call()
            counting[0] = False
        why = wrong(it.read(result), bench.exact, bench.plain)
    assert why is None, f"{operation}: {why}"
    return {name: dict(row) for name, row in found.items()} | {"least": bench.work.bytes}


def markdown(archs: tuple[int, ...] = (80, 90)) -> str:
    lines = [
        "| operation | sm | kernels | warp instructions | tensor, special | MB asked for | / least | bank conflicts |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for operation in CASES:
        for arch in archs:
            rows = measure(operation, arch)
            least, kinds = rows.pop("least"), ("launches", "loaded", "stored", "conflicts")
            moved = sum(row["loaded"] + row["stored"] for row in rows.values())
            instructions = sum(n for row in rows.values() for kind, n in row.items() if kind not in kinds)
            tensor, special, conflicts = (
                sum(row.get(kind, 0) for row in rows.values()) for kind in ("tensor", "special", "conflicts")
            )
            cells = [operation, arch, ", ".join(rows), instructions, f"{tensor}, {special}", f"{moved / 1e6:.2f}"]
            cells += [f"{moved / least:.2f}", conflicts]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    if not (TESTS / "emulated.py").is_file():
        sys.exit("the emulator is in tests/: run this in a source tree")
    print(markdown())
