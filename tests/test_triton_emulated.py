"""Triton's kernels as compiled for sm_80 and sm_90, executed by the PTX emulator with its checkers."""

from __future__ import annotations

import re

import edges
import grid
import pytest
import torch
from grid import Chunk, Life, Loss, Window
from ptx import emulator

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(emulator.unavailable() is not None, reason=str(emulator.unavailable()))

CPU = torch.device("cpu")
WAIT = re.compile(r"cp\.async\.wait_group")
CASES = {
    # 77 tokens a frame: tiles of 128 queries and of 64 or 128 keys end inside frames.
    "life": [
        (Life(1, 2, 2, 0.5, head_dim=128, group=2, size=(7, 11)), torch.bfloat16),
        (Life(2, 1, 1, 0.999, "absolute", head_dim=64, kv_heads=2, pairing="half", batch=3, layers=2), torch.float16),
    ],
    "chunk": [(Chunk((1, 4), 1, 2, 2, head_dim=128, group=2, size=(7, 11)), torch.bfloat16)],
    "window": [
        (Window(150, 200, 10, 70, chunk=1, head_dim=128, group=2), torch.bfloat16),
        (Window(154, 231, 77, 77, chunk=77, pairing="half", size=(7, 11), head_dim=64), torch.float16),
        (Window(140, 140, 70, 35, 35, own=False, pairing="interleaved", size=(5, 7), head_dim=48), torch.bfloat16),
    ],
    "loss": [
        (Loss("elements", True, True, (2, 3, 4111)), torch.bfloat16),
        (Loss(None, False, False, (1, 5000), contiguous=False), torch.float16),
        # Sums joined in float32, and scalars divided approximately, are off by two units here.
        (Loss("elements", False, False, (1, 2, 4097), contiguous=False), torch.bfloat16),
    ],
}
EXPECTED = {
    "life": {"write_kernel", "begin_chunk_kernel", "forward_kernel"},
    "chunk": {"rotate_kernel", "forward_kernel", "delta_kernel", "grad_q_kernel", "grad_kv_kernel"},
    "window": {"forward_kernel", "delta_kernel", "grad_q_kernel", "grad_kv_kernel"},
    "loss": {"norm_kernel", "grad_kernel", "sum_kernel"},
}


@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize(
    "kind, case, dtype",
    [
        pytest.param(kind, case, dtype, id=f"{kind}-{case}-{str(dtype).split('.')[1]}")
        for kind, cases in CASES.items()
        for case, dtype in cases
    ],
)
def test_on_the_emulator(kind, case, dtype, arch):
    from emulated import on_emulator

    with on_emulator(arch) as launched:
        getattr(grid, f"run_{kind}")("triton", CPU, dtype, case)
    assert EXPECTED[kind] <= set(launched)


def generated():
    """The grids of generated cases, in both half precisions and for both architectures in turns."""
    grids = {"life": grid.LIVES, "chunk": grid.CHUNKS, "window": grid.WINDOWS, "loss": grid.LOSSES}
    for kind, cases in grids.items():
        for number, case in enumerate(cases):
            dtype, arch = (torch.bfloat16, torch.float16)[number % 2], (80, 90)[number // 2 % 2]
            yield pytest.param(kind, case, dtype, arch, id=f"{kind}-{case}-{str(dtype).split('.')[1]}-sm_{arch}")


@pytest.mark.slow
@pytest.mark.parametrize("kind, case, dtype, arch", list(generated()))
def test_generated_cases_on_the_emulator(kind, case, dtype, arch):
    from emulated import on_emulator

    with on_emulator(arch) as launched:
        getattr(grid, f"run_{kind}")("triton", CPU, dtype, case)
    assert launched


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("positions", ["before_window", "absolute"])
def test_sinks_in_half_precision_on_the_emulator(dtype, positions):
    """Averages that are rounded at every step, as published."""
    from emulated import on_emulator

    with on_emulator(80) as launched:
        grid.run_life("triton", CPU, dtype, Life(2, 3, 2, 0.5, positions, head_dim=64), sink_dtype=dtype)
    assert "begin_chunk_kernel" in launched


def test_shared_keys_are_merged_on_the_emulator():
    """Few query tiles, many keys: all of them are the tail."""
    from emulated import on_emulator

    with on_emulator(80) as launched:
        grid.run_tail("triton", CPU, torch.bfloat16, "prefix", 1)
    assert launched[-2:] == ["forward_kernel", "merge_kernel"]


@pytest.mark.parametrize("arch", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("use", ["prefix", "chunk", "window"])
def test_whole_tiles_and_a_tail_on_the_emulator(use, arch):
    """Nine tiles of queries on the eight processors that a CPU stands for."""
    from emulated import on_emulator

    with on_emulator(arch) as launched:
        grid.run_tail("triton", CPU, torch.bfloat16, use, 9)
    forward = [name for name in launched if name in ("forward_kernel", "merge_kernel")]
    assert forward == ["forward_kernel", "forward_kernel", "merge_kernel"]


@pytest.mark.parametrize(
    "slope, arch",
    [
        pytest.param(slope, arch, id=f"{name}-sm_{arch}", marks=[pytest.mark.slow] * ((slope > 0) == (arch == 90)))
        for name, slope in (("rising", edges.SLOPE), ("falling", -edges.SLOPE))
        for arch in (80, 90)
    ],
)
@pytest.mark.parametrize("use", ["window", "pass", "chunk"])
def test_edges_of_tiles_on_the_emulator(use, slope, arch):
    """The interpreter has every length; here each use has a few with the tiles that are compiled."""
    from emulated import on_emulator

    with on_emulator(arch):
        windows = edges.WINDOWS[::4] + edges.FIRST_KEYS * (slope < 0)
        for case in windows if use == "window" else edges.STREAMS[::3]:
            if use == "window":
                edges.run_window("triton", CPU, torch.bfloat16, case, slope)
            else:
                edges.run_stream("triton", CPU, torch.bfloat16, case, slope, use == "chunk")


@pytest.mark.parametrize("lost", ["barrier", "wait"])
def test_a_planted_defect_is_caught(lost, monkeypatch):
    """One barrier, or the waits for asynchronous copies, missing from the forward kernel's PTX."""
    import emulated

    def defective(text):
        if "forward_kernel" in text:
            text = text.replace("bar.sync", "// bar.sync") if lost == "barrier" else WAIT.sub("// ", text)
        return emulator.Module(text)

    monkeypatch.setattr(emulated, "_module", defective)
    with emulated.on_emulator(80), pytest.raises(emulator.PTXError) as caught:
        grid.run_chunk("triton", CPU, torch.bfloat16, CASES["chunk"][0][0])
    assert caught.value.kind in ("shared-hazard", "in-flight", "uninitialised")
