"""Limits that follow from sizes and from machine code, computed, not measured: ``python -m benchmarks.bounds``.

For the attention loops of the static report: the clocks that one score costs each unit of an SM, and so the share of
the tensor peak that the loop can reach at most. For the other kernels: the bytes they must move. For the model: what a
chunk costs. The README carries the output, with what was measured on GPUs; ``--write`` renews it, and a test compares.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import figure, gpu_page, waves
from .cases import CASES, Work

BASELINE = Path(__file__).parent / "static_baseline.json"
CUDA_BASELINE = Path(__file__).parent / "cuda_baseline.json"
CUDA_LOOPS = Path(__file__).parent / "cuda_interior.json"
README = Path(__file__).parent / "README.md"
MEASURED = Path(__file__).parent / "gpu"  # results.json of each card, under its name

ISSUE = 4  # warp instructions a clock: one by each of an SM's four schedulers
SPECIAL = 16  # results of the special-function units a clock
SHARED = 128  # bytes that shared memory delivers a clock


@dataclass(frozen=True)
class Gpu:
    """tensor: FLOP of dense bfloat16 products with float32 sums, a clock and SM. rows: of queries that one read of an
    operand from shared memory serves; None: those of a warp (mma.sync)."""

    name: str
    sms: int
    ghz: float
    tensor: int
    gbps: float
    rows: int | None

    @property
    def tflops(self) -> float:
        return self.sms * self.ghz * self.tensor / 1e3


# NVIDIA's A100, H100 and RTX Blackwell architecture whitepapers (SMs, boost clock, tensor throughput, memory) and the
# DGX B200 data sheet; issue slots, special functions and shared memory from the CUDA programming guide.
GPUS = {
    80: Gpu("A100 SXM 80 GB", 108, 1.41, 2048, 2039, None),
    90: Gpu("H100 SXM", 132, 1.83, 4096, 3350, 64),
    100: Gpu("B200", 148, 1.856, 8192, 8000, 128),
    120: Gpu("RTX 5090", 170, 2.407, 512, 1792, None),
}


def loop_bounds(row: dict, gpu: Gpu, head_dim: int = 128, itemsize: int = 2) -> dict[str, float]:
    """Clocks of an SM per 1000 scores, by unit, for a row of the static report with an instruction mix."""
    loop, block_m = row["loop"], row["tile"][0]
    counted = [loop.get(key, 0) for key in ("tensor", "memory", "special", "barrier", "idle", "other")]
    rest = sum(counted) - loop["tensor"]
    scores = rest / loop["per_score"]  # of a thread, in one turn of the loop; a warp instruction serves 32 threads
    rows = min(block_m, gpu.rows or block_m // row["warps"])
    return {
        "tensor": 1000 * 4 * head_dim / gpu.tensor,
        "issue": 1000 * sum(counted) / (32 * scores) / ISSUE,
        "special": 1000 * loop["special"] / scores / SPECIAL,
        "shared": 1000 * 2 * head_dim * itemsize / rows / SHARED,
    }


def attention_table() -> list[str]:
    lines = [
        "| kernel | GPU | tile | tensor | issue | special | shared | bound by | of tensor peak | without overlap |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cuda = [
        (arch, {"case": "CUDA"} | row)
        for arch, row in _baseline(CUDA_LOOPS)
        if row["kernel"].endswith("_d128_k32" if arch == 120 else "_d128")  # the host's choice
    ]
    for arch, row in [*_baseline(BASELINE), *cuda]:
        if "forward" not in row["kernel"] or row.get("loop") is None or row["case"].startswith("anchor"):
            continue
        gpu = GPUS[arch]
        clocks = loop_bounds(row, gpu)
        worst = max(clocks, key=clocks.get)
        cells = " | ".join(f"{value:.0f}" for value in clocks.values())
        tile = " x ".join(map(str, row["tile"]))
        tensor, rest = clocks["tensor"], max(clocks["issue"], clocks["special"])
        shares = f"{100 * tensor / clocks[worst]:.0f} % | {100 * tensor / (tensor + rest):.0f} %"
        lines.append(f"| {row['case']}: {row['kernel']} | {gpu.name} | {tile} | {cells} | {worst} | {shares} |")
    return lines


def _baseline(path: Path) -> Iterator[tuple[int, dict]]:
    """(architecture, row) of the newest toolchain that a baseline has for an architecture."""
    newest: dict[int, tuple[list[int], list[dict]]] = {}
    for toolchain, rows in json.loads(path.read_text()).items():
        made_by, _, arch = toolchain.rpartition(", sm_")
        version = [int(x) for x in re.findall(r"\d+", made_by)]
        at = int(arch.rstrip("a"))
        if at not in newest or newest[at][0] < version:
            newest[at] = version, rows
    for arch, (_, rows) in newest.items():
        for row in rows:
            yield arch, row


def static_table() -> list[str]:
    """What the assembler made of each kernel: registers, CTAs that an SM holds, bytes of stack where there are any."""
    found: dict[str, dict[int, str]] = {}
    for path in (BASELINE, CUDA_BASELINE):
        for arch, row in _baseline(path):
            name = row["kernel"] if path == CUDA_BASELINE else f"{row['case']}: {row['kernel']}"
            other = re.search(r"_fp16|_fp32|_d(?!128)\d+", row["kernel"]) or row.get("case", "").startswith("anchor")
            if not other:
                stack = f", {row['stack']} B stack" if row["stack"] else ""
                found.setdefault(name, {})[arch] = f"{row['registers']}, {row['ctas_per_sm']}{stack}"
    lines = ["| kernel | " + " | ".join(f"sm_{arch}" for arch in GPUS) + " |", "|---|" + "---|" * len(GPUS)]
    return lines + [f"| {name} | " + " | ".join(row.get(a, "") for a in GPUS) + " |" for name, row in found.items()]


def memory_table() -> list[str]:
    """The paper's shape: milliseconds that the bytes alone take, beside those that the products alone take."""
    paper, clip = CASES["paper"], CASES["clip-rope"]
    works: dict[str, Work] = {
        "begin_chunk, 30 layers": paper.begin_chunk(),
        "write, a layer": paper.write(),
        "streaming pass, a layer": paper.attention(),
        "chunk attention, a layer": paper.chunk_attention(),
        "chunk attention, forward and backward": paper.chunk_attention_training(),
        "sequence of 21 frames, forward": clip.forward(),
        "sequence of 21 frames, forward and backward": clip.training(),
        "Re-DMD loss": CASES["clip-latent"].redmd(),
    }
    gpus = list(GPUS.values())
    lines = [
        "| operation | GFLOP | MB | " + " | ".join(f"{g.name}, us" for g in gpus) + " |",
        "|---|---|---|" + "---|" * 4,
    ]
    for name, work in works.items():
        cells = []
        for gpu in gpus:
            tensor, dram = work.flops / gpu.tflops / 1e6, work.bytes / gpu.gbps / 1e3
            cells.append(f"{max(tensor, dram):.0f} ({'tensor' if tensor > dram else 'DRAM'})")
        lines.append(f"| {name} | {work.flops / 1e9:.1f} | {work.bytes / 1e6:.1f} | " + " | ".join(cells) + " |")
    return lines


def figure_table() -> list[str]:
    """The paper's figure, computed: what a chunk needs at least on an H100, and what 60 frames/s ask."""
    gpu = GPUS[90]
    return figure.table(figure.Machine(gpu.name, gpu.tflops, gpu.gbps))


def gpu_pages() -> list[str]:
    """What has been measured: each saved results.json of `benchmarks.gpu_check`."""
    pages = [gpu_page.page(json.loads(path.read_text())) for path in sorted(MEASURED.glob("*.json"))]
    return "\n".join(pages).splitlines() or ["No results of a GPU have been committed yet."]


SECTIONS = {
    "static": static_table,
    "loops": attention_table,
    "waves": waves.table,
    "memory": memory_table,
    "figure": figure_table,
    "gpu": gpu_pages,
}


def marked(name: str, text: str) -> str:
    return f"<!-- {name}: python -m benchmarks.bounds --write -->\n{text}\n<!-- end of {name} -->"


def renewed(page: str) -> str:
    """The page with every marked section as it is computed now.

    Raises:
        ValueError: the page lacks a section.
    """
    for name, make in SECTIONS.items():
        pattern = re.compile(rf"<!-- {name}:.*?<!-- end of {name} -->", re.DOTALL)
        if not pattern.search(page):
            raise ValueError(f"the page has no section {name!r}")
        text = marked(name, "\n".join(make()))
        page = pattern.sub(lambda _, text=text: text, page)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bounds", description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the sections of README.md")
    if parser.parse_args().write:
        README.write_text(renewed(README.read_text()))
        return 0
    for name, make in SECTIONS.items():
        print(f"{name}\n", *make(), "", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
