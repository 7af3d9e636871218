"""The Triton backend: its numeric tests in a process of their own, compilation ahead of time, and its refusals."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rfkernels as rf

pytest.importorskip("triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU tests/triton_backend run as they are")
@pytest.mark.parametrize(
    "module",
    [
        *(f"triton_backend/test_{name}.py" for name in ("cache", "phases", "gradients", "addresses", "edges")),
        "test_ops.py",
    ],
)
def test_in_the_interpreter(module):
    """Triton decides at import whether it interprets; this process must not, or every test would run interpreted."""
    from rfkernels.backends.triton import _interpreter_fault

    if reason := _interpreter_fault():
        pytest.skip(reason)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    file = str(Path(__file__).parent / module)
    command = [sys.executable, "-m", "pytest", "-p", "interpreted", "-x", "-rs", file, "-k", "triton"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    if lacking := re.search("cannot reserve .*", run.stdout):
        pytest.skip(lacking[0])
    assert "passed" in run.stdout and "skipped" not in run.stdout, run.stdout[-2000:]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why():
    assert "TRITON_INTERPRET" in rf.explain_backends("cpu")["triton"]
    with pytest.raises(ValueError, match="TRITON_INTERPRET"), rf.use_backend("triton"):
        pass


def test_import_works_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import rfkernels as rf\n"
        "assert 'not installed' in rf.explain_backends('cpu')['triton'], rf.explain_backends('cpu')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_older_triton_is_refused_by_name(monkeypatch):
    from rfkernels.backends import triton as backend

    for version, refused in (("3.5.1", True), ("3.6.0", False), ("3.8.0+git1", False), ("4.0", False)):
        monkeypatch.setattr(sys.modules["triton"], "__version__", version)
        reason = backend.unavailable(torch.device("cuda"))
        assert (reason == f"Triton {version} is older than 3.6, which the kernels need") == refused


def test_importing_rfkernels_leaves_triton_alone():
    code = (
        "import sys, torch\nbefore = 'triton' in sys.modules\n"
        "import rfkernels\nassert ('triton' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tiles_are_chosen_by_families_of_architectures():
    from rfkernels.backends.triton.tiles import family

    known = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120}
    assert {arch: family(arch) for arch in known} == known


_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_ARCHITECTURES = (80, 90, 100, 120)


def chosen_tiles():
    """Every tile of the attention kernels that a call can meet."""
    from rfkernels.backends.triton import tiles

    kinds = itertools.product(_ARCHITECTURES, range(32, 257, 16), _DTYPES)
    for (arch, head_dim, dtype), yes in itertools.product(kinds, (False, True)):
        for use, shared in itertools.product(("prefix", "chunk", "window"), (False, True)):
            given = (arch, head_dim, dtype, use)
            yield given, "forward", tiles.forward_tile(*given, rope=yes, shared=shared)
        for use, of in itertools.product(("chunk", "window"), ("queries", "keys")):
            given = (arch, head_dim, dtype, use)
            yield given, of, tiles.backward_tile(*given, of, short=yes)


def test_products_sum_over_16_at_least():
    """What every supported Triton compiles; the edges of the forward kernel go in tiles of 16 at least."""
    for given, of, tile in chosen_tiles():
        assert min(tile.rows, tile.keys) >= 16, (given, of, tile)


def test_no_wgmma_reads_copies_that_lack_a_fence(monkeypatch):
    """Below Triton 3.7 on sm_90: copies go by registers (one stage), or products by mma.sync (fewer than 64 rows)."""
    from rfkernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "COPIES_ARE_FENCED", False)
    for (arch, head_dim, dtype, use), of, tile in chosen_tiles():
        if arch == 90 and dtype != torch.float32:  # exact products of float32 are not wgmma's
            product_rows = tile.keys if of == "keys" else tile.rows
            assert tile.stages == 1 or product_rows < 64, (head_dim, dtype, use, of, tile)


class _Parsed(Exception):
    """A kernel has passed Triton's front end."""


def _stop_after_parsing(*arguments):
    """A hook of Triton's compiler."""

    def stop(source, metadata):
        raise _Parsed

    if arguments:
        arguments[1]["ttgir"] = stop
    return "only parsed", "only parsed"


@pytest.mark.parametrize("head_dim", [96, 256])
def test_exact_products_pass_the_front_end(head_dim, monkeypatch):
    """The front end of this Triton refuses shapes of products that another takes; the cheap part of what is below."""
    import triton

    aot = pytest.importorskip("benchmarks.aot", reason="needs the source tree")
    from benchmarks.static_calls import calls

    compile_or_launch, parsed = triton.runtime.jit.JITFunction.run, []

    def parse(self, *args, grid, warmup, **options):
        with pytest.raises(_Parsed):
            compile_or_launch(self, *args, grid=grid, warmup=True, **options)
        parsed.append(self.fn.__name__)

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", parse)
    monkeypatch.setattr(triton.runtime.driver, "_active", aot._Driver(80))
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", _stop_after_parsing)
    for call in calls(torch.float32, head_dim).values():
        call()
    assert {"forward_kernel", "grad_q_kernel", "grad_kv_kernel", "begin_chunk_kernel"} <= set(parsed)


def _of_architectures(by_default):
    """All of them; each takes minutes, so that the others are slow."""
    marked = [pytest.param(arch, marks=[pytest.mark.slow] * (arch not in by_default)) for arch in _ARCHITECTURES]
    return pytest.mark.parametrize("arch", marked)


@_of_architectures([80])
@pytest.mark.parametrize(
    "dtype, head_dim",
    [
        pytest.param(
            dtype, head_dim, id=f"{name}-{head_dim}", marks=[pytest.mark.slow] * ((name, head_dim) != ("bf16", 128))
        )
        for name, dtype in [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
        for head_dim in (128, 64, 256, 96, 32, 48, 80)
    ],
)
def test_every_kernel_compiles_ahead_of_time(arch, dtype, head_dim):
    """No spill, no stack frame, within the shared memory of the architecture; needs no GPU."""
    aot = pytest.importorskip("benchmarks.aot", reason="needs the source tree")
    from benchmarks.static_calls import calls, forms
    from benchmarks.static_report import faults

    for name, call in (calls(dtype, head_dim) | forms(dtype, head_dim)).items():
        launched = aot.compiled(call, arch)
        assert launched, name
        if name.endswith("shared"):
            assert launched[-1].name == "merge_kernel", name
        for kernel in launched:
            assert faults(kernel) is None, f"{name} for sm_{arch}: {faults(kernel)}: {kernel}"


@_of_architectures([80, 90])
def test_the_static_report_has_not_changed(arch):
    """Against the checked-in baseline, for the toolchains it knows."""
    report = pytest.importorskip("benchmarks.static_report", reason="needs the source tree")
    baseline, toolchain = json.loads(report.BASELINE.read_text()), report.toolchain(arch)
    if toolchain not in baseline:
        pytest.skip(f"the baseline knows {sorted(baseline)}, not {toolchain}")
    assert report.report(torch.bfloat16, 128, arch) == baseline[toolchain]
