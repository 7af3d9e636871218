"""What nvcc made of the CUDA kernels: ``python -m benchmarks.cuda_report [--interior] [--check | --write]``.

Registers, stack, spills, shared memory and CTAs per SM of every kernel entry, for every architecture, without a GPU.
Sources and flags are those of CMakeLists.txt. Static facts only: nothing here is a timing. ``--interior`` reports
instead what the attention forward's main loop executes a score (benchmarks/interior.py).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from benchmarks import interior, straight
from benchmarks.aot import SHARED_BLOCK, TOOLS, ctas_per_sm
from benchmarks.static_report import compare, merge
from rfkernels.toolchain import find_nvcc

ROOT = Path(__file__).parents[1]
CUDA = ROOT / "csrc" / "cuda"
BASELINE = Path(__file__).parent / "cuda_baseline.json"
ARCHITECTURES = (80, 90, 120)
SMALL_SM = (120,)  # 100 KB of shared memory an SM: the host takes the _k32 kernels there (csrc/host/cuda/attention.cpp)


@cache
def _cmake() -> str:
    return (ROOT / "CMakeLists.txt").read_text()


def _set(name: str) -> list[str]:
    """The words of ``set(<name> ...)`` in CMakeLists.txt."""
    return re.search(rf"^\s*set\({name}\s([^)]*)\)", _cmake(), re.M)[1].split()


DTYPES = ("bf16", "fp16")
HEAD_DIMS = tuple(int(x) for x in _set("RF_CUDA_ALL_HEAD_DIMS"))


def sources(head_dims: Sequence[int], dtypes: Sequence[str] = DTYPES, arch: int = 80) -> list[Path]:
    """The .cu files of the build; of the attention kernels those of some head sizes and dtypes. 9.0 has more."""
    attention = [
        path
        for folder, kind in (("sm80", "forward"), ("sm80", "backward"), *([("sm90", "forward")] if arch == 90 else []))
        for head_dim in head_dims
        for dtype in dtypes
        for path in [CUDA / "attention" / folder / "instances" / f"{kind}_{dtype}_d{head_dim}.cu"]
    ]
    return [ROOT / name for name in _set("RF_CUDA_KERNELS") if name.endswith(".cu")] + attention


def toolchain(nvcc: str, arch: int) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return f"nvcc {re.search(r'release [^,]*, V([0-9.]+)', said)[1]}, sm_{arch}"


def chosen(entry: str, arch: int) -> bool:
    """Whether the host launches this kernel on this architecture, or on one that runs its code: sm_86 and sm_89 have
    that of sm_80, and 100 KB of shared memory an SM.
    """
    if "_forward_" not in entry or "_d128" not in entry or arch == 80:
        return True
    return entry.endswith("_k32") == (arch in SMALL_SM)


_ENTRY = re.compile(r"\.entry (\w+)\(.*?\)\s*(.*?)\{(.*?)^\}", re.S | re.M)
_EXTERN_SHARED = re.compile(r"^\.extern \.shared .* (\w+)\[\];", re.M)
_STATED = re.compile(r"// dynamic shared memory: (\d+) bytes")  # by state_shared_bytes (csrc/cuda/attention/swizzle.h)
_ASSEMBLED = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
    r".*?Used (\d+) registers([^\n]*)",
    re.S,
)


def launch_bounds(ptx: str) -> dict[str, tuple[int, int, int]]:
    """Of every kernel: threads and blocks an SM (__launch_bounds__), and the dynamic shared memory that it asks for.

    Raises:
        RuntimeError: a kernel uses dynamic shared memory without stating how much.
    """
    bounds, extern = {}, _EXTERN_SHARED.findall(ptx)
    for name, directives, body in _ENTRY.findall(ptx):
        threads = re.search(r"\.maxntid (\d+)", directives)
        blocks = re.search(r"\.minnctapersm (\d+)", directives)
        stated = _STATED.search(body)
        if not stated and any(re.search(rf"\b{array}\b", body) for array in extern):
            raise RuntimeError(f"{name} uses dynamic shared memory and does not call state_shared_bytes")
        bounds[name] = int(threads[1]), int(blocks[1]) if blocks else 1, int(stated[1]) if stated else 0
    return bounds


def kernels(nvcc: str, source: Path, arch: int) -> Iterator[dict]:
    """Compiles ``source`` with the flags of the build; a row for every kernel in it."""
    with tempfile.TemporaryDirectory() as folder:
        hopper = "sm90" in source.parts
        target = f"{arch}a" if hopper else arch
        gencode = f"-gencode=arch=compute_{target},code=sm_{target}"
        flags = [*_set("RF_CUDA_FLAGS"), gencode, "-Xptxas=-v", "-keep", f"-keep-dir={folder}"]
        command = [nvcc, *flags, "-cubin", str(source), "-o", f"{folder}/out.cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr}")
        if "Potential Performance Loss" in done.stderr:  # of products that run one by one, of registers not handed over
            raise RuntimeError(f"ptxas on {source}:\n{done.stderr}")
        (ptx,) = (path.read_text() for path in Path(folder).glob("*.ptx"))
        if hopper:
            dump = [str(TOOLS / "cuobjdump"), "-sass", f"{folder}/out.cubin"]
            sass = subprocess.run(dump, capture_output=True, text=True, check=True).stdout
    bounds = launch_bounds(ptx)
    assembled = _ASSEMBLED.findall(done.stderr)
    if {name for name, *_ in assembled} != set(bounds):
        raise RuntimeError(f"ptxas -v does not describe the kernels of {source} as expected:\n{done.stderr}")
    for name, stack, stores, loads, registers, rest in sorted(assembled):
        threads, designed, dynamic = bounds[name]
        static = re.search(r"(\d+) bytes smem", rest)
        shared = (int(static[1]) if static else 0) + dynamic
        by_registers, by_shared, by_threads = ctas_per_sm(arch, int(registers), threads // 32, shared)
        loop = {"loop": straight.row(sass, 32 if "_d256" in name else 64)} if "_hopper_" in name else {}
        yield {
            "kernel": name, "threads": threads, "registers": int(registers), "stack": int(stack),
            "spill_stores": int(stores), "spill_loads": int(loads), "shared": shared, "ctas_asked": designed,
            "ctas_by_registers": min(by_registers, by_threads), "ctas_per_sm": min(by_registers, by_shared, by_threads),
            **loop,
        }  # fmt: skip


def report(nvcc: str, arch: int, head_dims: Sequence[int] = HEAD_DIMS, dtypes: Sequence[str] = DTYPES) -> list[dict]:
    """Rows of every kernel; MAX_JOBS (or one per processor) compilers at a time."""
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    with ThreadPoolExecutor(jobs) as pool:
        rows = pool.map(lambda source: list(kernels(nvcc, source, arch)), sources(head_dims, dtypes, arch))
        return [row for of_source in rows for row in of_source]


def interior_rows(nvcc: str, arch: int, head_dims: Sequence[int] = HEAD_DIMS) -> list[dict]:
    """Of the bfloat16 forward kernels that the host takes: what their main loop executes."""
    rows = []
    for head_dim in head_dims:
        (source,) = (path for path in sources([head_dim], ["bf16"]) if path.name.startswith("forward"))
        ptx, disassembly = interior.compiled(nvcc, _set("RF_CUDA_FLAGS"), source, arch)
        rows += [interior.row(k, head_dim, ptx, disassembly) for k in sorted(launch_bounds(ptx)) if chosen(k, arch)]
    return rows


def faults(row: dict, arch: int) -> str | None:
    """What no kernel may have: a stack frame, spills, more shared memory than a block gets, fewer CTAs than asked for.

    On Hopper: exponentials that wait for the products which they should run beside. Shared memory counts only where the
    host chooses the kernel.
    """
    if row["stack"] or row["spill_stores"] or row["spill_loads"]:
        return f"{row['stack']} bytes of stack, {row['spill_stores']} stored and {row['spill_loads']} loaded by spills"
    if row["ctas_by_registers"] < row["ctas_asked"]:
        return f"registers for {row['ctas_by_registers']} CTAs an SM, {row['ctas_asked']} asked for"
    if chosen(row["kernel"], arch) and row["shared"] > SHARED_BLOCK[arch]:
        return f"{row['shared']} bytes of shared memory"
    if "loop" in row and row["loop"]["overlapped"] < row["loop"]["special"]:
        return f"{row['loop']['overlapped']} of {row['loop']['special']} exponentials run beside the products"
    return None


def show(rows: list[dict]) -> None:
    for r in rows:
        print(
            f"{r['kernel']:34s} {r['threads']:3d} threads {r['registers']:3d} regs {r['stack']:4d} stack "
            f"{r['spill_stores']:4d}/{r['spill_loads']:<4d} spilled {r['shared']:7d} B  {r['ctas_by_registers']} "
            f"CTA/SM by registers, {r['ctas_per_sm']} in all"
            + (f"; a score {r['loop']['per_score']} + {r['loop']['copies_per_score']}" if "loop" in r else "")
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS, choices=HEAD_DIMS)
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES, help="of the attention kernels")
    parser.add_argument("--interior", action="store_true", help="instead: the forward's main loop, counted")
    parser.add_argument("--check", action="store_true", help="compare with the checked-in baseline")
    parser.add_argument("--write", action="store_true", help="write these rows into the baseline")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("no nvcc on PATH or from pip")
    reports, baseline = {}, interior.BASELINE if arguments.interior else BASELINE
    for arch in arguments.arch:
        print(toolchain(nvcc, arch))
        if arguments.interior:
            rows = interior_rows(nvcc, arch, arguments.head_dims)
            interior.show(rows)
        else:
            rows = report(nvcc, arch, arguments.head_dims, arguments.dtypes)
            show(rows)
            for row in rows:
                if fault := faults(row, arch):
                    print(f"fault: {row['kernel']}: {fault}")
        reports[toolchain(nvcc, arch)] = rows
        if arguments.write:  # at once: an architecture takes minutes
            merge(baseline, {toolchain(nvcc, arch): rows}, by="kernel")
    return 0 if not arguments.check or compare(baseline, reports, by="kernel") else 1


if __name__ == "__main__":
    sys.exit(main())
