"""What the assembler made of the Triton kernels: ``python -m benchmarks.static_report [--check | --write | --survey]``.

Registers, spills, stack, shared memory, CTAs per SM and the instruction mix of the forward kernel's mask-free loop, for
every architecture, without a GPU. Static facts only: nothing here is a timing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks.aot import ARCHITECTURES, SHARED_BLOCK, TOOLS, Compiled, compiled
from benchmarks.static_calls import calls, forms
from rfkernels.backends.triton import tiles

BASELINE = Path(__file__).parent / "static_baseline.json"
SURVEYED = (128, 64, 256, 96, 32, 48, 80)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# --- the main loop ----------------------------------------------------------------------------------------------------

_TENSOR = re.compile(r"HMMA|HGMMA|UTC\w*MMA|OMMA|QMMA")
_MEMORY = re.compile(r"LD|ST|UTMA|UBLKCP|ATOM|RED\b")
_BARRIER = re.compile(r"BAR|WARPSYNC|SYNCS|DEPBAR|WARPGROUP")


def loops(sass: str) -> Iterator[list[str]]:
    """Opcodes of every innermost loop: from a label to the branch back to it."""
    where: dict[str, int] = {}
    opcodes: list[str] = []
    spans = []
    for line in sass.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            where[label[1]] = len(opcodes)
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            target = re.search(r"\.(L_x_\d+)", found[2])
            if found[1].startswith("BRA") and target and target[1] in where:
                spans.append((where[target[1]], len(opcodes) + 1))
            opcodes.append(found[1])
    for begin, end in spans:
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans):
            yield opcodes[begin:end]


def main_loop(kernel: Compiled) -> dict | None:
    """The mask-free loop: counts for one warp, and non-tensor instructions per score.

    It has the most products a turn, and of the loops with as many (masked ones of the same tile) it is the shortest.
    """
    scores = kernel.options["BLOCK_M"] * kernel.options["BLOCK_N"] // (32 * kernel.warps)

    def counts(loop: list[str]) -> Counter:
        return Counter(
            "tensor" if _TENSOR.match(op) else "special" if op.startswith("MUFU") else
            "barrier" if _BARRIER.match(op) else "memory" if _MEMORY.match(op) else "other"
            for op in loop
        )  # fmt: skip

    def turns(loop: list[str]) -> int:  # ptxas may unroll
        return max(1, round(sum(op.startswith("MUFU.EX2") for op in loop) / scores))

    found = [loop for loop in loops(kernel.sass) if counts(loop)["tensor"]]
    if not found:
        return None
    loop = max(found, key=lambda loop: (counts(loop)["tensor"] / turns(loop), -len(loop) / turns(loop)))
    kinds = counts(loop)
    rest = len(loop) - kinds["tensor"]
    return {key: kinds[key] for key in ("tensor", "memory", "special", "barrier", "other")} | {
        "turns": turns(loop), "per_score": round(rest / (scores * turns(loop)), 2)
    }  # fmt: skip


def words_of_fragments(kernel: Compiled) -> int:
    """Loads of operands in loops on tensor cores that are no ldmatrix: the compiler chose a layout that fits none."""
    return sum(op.startswith("LDS.64") for loop in loops(kernel.sass) if any(map(_TENSOR.match, loop)) for op in loop)


# --- the report -------------------------------------------------------------------------------------------------------


def toolchain(arch: int) -> str:
    tool = "ptxas-blackwell" if arch >= 100 else "ptxas"
    said = subprocess.run([str(TOOLS / tool), "--version"], capture_output=True, text=True).stdout
    return f"triton {triton.__version__}, ptxas {re.search(r'release [^,]*, V([0-9.]+)', said)[1]}, sm_{arch}"


def row(name: str, kernel: Compiled) -> dict:
    options = kernel.options
    tile = [options[k] for k in ("BLOCK_M", "BLOCK_N") if k in options]
    if options.get("SHARES", 1) > 1 and not name.endswith("shared"):
        name += ", tail"
    facts = {
        "case": name, "kernel": kernel.name, "tile": tile, "warps": kernel.warps, "stages": kernel.stages,
        "registers": kernel.registers, "spills": kernel.spills, "stack": kernel.stack, "shared": kernel.shared,
        "ctas_per_sm": kernel.ctas_per_sm,
    }  # fmt: skip
    if kernel.name in ("forward_kernel", "grad_q_kernel", "grad_kv_kernel"):
        facts["loop"] = main_loop(kernel)
    return facts


def anchors(dtype: torch.dtype, arch: int) -> Iterator[dict]:
    """The streaming kernel at the anchors' tiles: two and three stages side by side."""
    chosen = tiles.forward_tile
    rows = (128, 128) if arch in (90, 100) else (128, 64)
    try:
        for stages in (2, 3):
            tiles.forward_tile = lambda *_, stages=stages, **__: tiles.TileSize(*rows, 8, stages)
            launched = compiled(calls(dtype, 128)["streaming"], arch)
            yield from (row(f"anchor, {stages} stages", k) for k in launched if k.name == "forward_kernel")
    finally:
        tiles.forward_tile = chosen


def report(dtype: torch.dtype, head_dim: int, arch: int) -> list[dict]:
    rows = [row(name, kernel) for name, call in calls(dtype, head_dim).items() for kernel in compiled(call, arch)]
    return rows + (list(anchors(dtype, arch)) if head_dim == 128 else [])


def show(rows: list[dict]) -> None:
    for r in rows:
        tile = "x".join(map(str, r["tile"])) or "-"
        loop = r.get("loop")
        mix = "" if not loop else "  " + " ".join(f"{k} {v}" for k, v in loop.items())
        print(
            f"{r['case']:22s} {r['kernel']:19s} {tile:8s} {r['warps']} warps {r['stages']} stages  {r['registers']:3d} "
            f"regs {r['spills']:4d} spill {r['stack']:4d} stack {r['shared']:7d} B  {r['ctas_per_sm']} CTA/SM{mix}"
        )


def faults(kernel: Compiled) -> str | None:
    """What no kernel may have: spills, a stack frame, more shared memory than a block gets."""
    if kernel.spills or kernel.stack:
        return f"{kernel.spills} spills, {kernel.stack} bytes of stack"
    if kernel.shared > SHARED_BLOCK[kernel.arch]:
        return f"{kernel.shared} bytes of shared memory"
    return None


def merge(baseline: Path, reports: dict[str, list[dict]], by: str | None = None) -> None:
    """Writes reports into the baseline; other toolchains' rows stay, with ``by`` also other values of that field."""
    kept = json.loads(baseline.read_text()) if baseline.exists() else {}
    for key, rows in reports.items():
        fresh = {row[by] for row in rows} if by else set()
        old = [row for row in kept.get(key, []) if row[by] not in fresh] if by else []
        kept[key] = sorted(old + rows, key=lambda row: row[by]) if by else rows
    lines = (
        f" {json.dumps(key)}: [\n" + ",\n".join("  " + json.dumps(r) for r in rows) + "\n ]"
        for key, rows in kept.items()
    )
    baseline.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def compare(baseline: Path, reports: dict[str, list[dict]], by: str | None = None) -> bool:
    """Whether the reports are those of the baseline; with ``by`` only the rows that they have are compared."""
    known, same = json.loads(baseline.read_text()), True
    for key, rows in reports.items():
        if key not in known:
            print(f"no baseline for {key}: not compared")
            continue
        fresh = {row[by] for row in rows} if by else set()
        expected = [row for row in known[key] if row[by] in fresh] if by else known[key]
        if expected != (sorted(rows, key=lambda row: row[by]) if by else rows):
            print(f"differs from the baseline: {key}")
            same = False
    return same


def survey(archs: list[int], dtypes: list[str], head_dims: list[int]) -> bool:
    """Every kernel at these dtypes and head sizes: lists those with faults, and says whether there are none."""
    clean = True
    for head_dim, name, arch in itertools.product(head_dims, dtypes, archs):
        dtype, faulty = DTYPES[name], []
        for case, call in (calls(dtype, head_dim) | forms(dtype, head_dim)).items():
            faulty += [row(case, k) for k in compiled(call, arch) if faults(k)]
        print(f"sm_{arch}, {name}, head_dim {head_dim}: {len(faulty)} with faults", flush=True)
        show(faulty)
        clean = clean and not faulty
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="*", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--check", action="store_true", help="compare with the checked-in baseline")
    parser.add_argument("--write", action="store_true", help="write these rows into the baseline")
    parser.add_argument("--survey", action="store_true", help="spills at every head size and dtype (hours), or at:")
    parser.add_argument("--dtype", nargs="*", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--head-dim", type=int, nargs="*", default=SURVEYED)
    arguments = parser.parse_args()
    if arguments.survey:
        return 0 if survey(arguments.arch, arguments.dtype, arguments.head_dim) else 1
    reports = {}
    for arch in arguments.arch:
        reports[toolchain(arch)] = report(torch.bfloat16, 128, arch)
        print(toolchain(arch), "bfloat16, head_dim 128")
        show(reports[toolchain(arch)])
    if arguments.write:
        merge(BASELINE, reports)
    return 0 if not arguments.check or compare(BASELINE, reports) else 1


if __name__ == "__main__":
    sys.exit(main())
