"""The Triton backend: its numeric tests in a process of their own, compilation ahead of time, and its refusals."""

from __future__ import annotations

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
    [*(f"triton_backend/test_{name}.py" for name in ("cache", "phases", "gradients", "addresses")), "test_ops.py"],
)
def test_in_the_interpreter(module):
    """Triton decides at import whether it interprets; this process must not, or every test would run interpreted."""
    from rfkernels.backends.triton import _interpreter_fault

    if reason := _interpreter_fault():
        pytest.skip(reason)
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-rs", str(Path(__file__).parent / module), "-k", "triton"]
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


def test_below_3_7_nothing_is_copied_asynchronously_on_hopper(monkeypatch):
    """Its compiler puts no fence between such copies and wgmma; see docs/dev/triton.md."""
    from rfkernels.backends.triton import tiles

    monkeypatch.setattr(tiles, "COPIES_ARE_FENCED", False)
    for head_dim, use in ((64, "prefix"), (128, "chunk"), (128, "window"), (256, "prefix")):
        forward = tiles.forward_tile(90, head_dim, torch.bfloat16, use, rope=True, shared=False)
        backward = [
            tiles.backward_tile(90, head_dim, torch.float16, use, of, short=False) for of in ("queries", "keys")
        ]
        assert {tile.stages for tile in (forward, *backward)} == {1}
    assert tiles.forward_tile(80, 128, torch.bfloat16, "chunk", rope=True, shared=False).stages == 2


def test_importing_rfkernels_leaves_triton_alone():
    code = (
        "import sys, torch\nbefore = 'triton' in sys.modules\n"
        "import rfkernels\nassert ('triton' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "tokens, processors, shares", [(64, 132, 1), (128, 132, 3), (390, 108, 4), (390, 132, 1), (1560, 108, 1)]
)
def test_keys_are_shared_where_query_tiles_are_few(tokens, processors, shares):
    """A chunk of three frames over nine, 12 heads; at 64 tokens a frame a merge costs more than it saves."""
    from rfkernels.backends.triton.tiles import TileSize, splits

    tile = TileSize(128, 128, 8, 2)
    assert splits(-(-3 * tokens // tile.rows) * 12, 9 * tokens, tile, processors) == shares


def test_tiles_are_chosen_by_families_of_architectures():
    from rfkernels.backends.triton.tiles import family

    known = {80: 80, 86: 80, 89: 80, 90: 90, 100: 100, 103: 100, 110: 100, 120: 120, 121: 120}
    assert {arch: family(arch) for arch in known} == known


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
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


def test_the_static_report_has_not_changed():
    """Against the checked-in baseline, for the toolchains it knows."""
    report = pytest.importorskip("benchmarks.static_report", reason="needs the source tree")
    baseline = json.loads(report.BASELINE.read_text())
    known = [arch for arch in report.ARCHITECTURES if report.toolchain(arch) in baseline]
    if not known:
        pytest.skip(f"the baseline knows {sorted(baseline)}, not {report.toolchain(80)}")
    for arch in known:
        assert report.report(torch.bfloat16, 128, arch) == baseline[report.toolchain(arch)]
