"""Machine code a score of the forward's main loop (benchmarks/interior.py), against the checked-in baseline."""

import json
from dataclasses import replace

import pytest
import torch
from ptx import emulator
from ptx.compile import find_nvcc

report = pytest.importorskip("benchmarks.cuda_report", reason="needs the source tree")
interior = report.interior

MOST = 8.5  # a score, up to head_dim 128; a score of 256 columns costs twice the products and their operands


@pytest.fixture(scope="module")
def nvcc():
    if reason := emulator.unavailable():
        pytest.skip(reason)
    return find_nvcc() or pytest.skip("no nvcc: the CUDA kernels cannot be compiled")


def check(nvcc: str, arch: int, head_dim: int) -> None:
    baseline, key = json.loads(interior.BASELINE.read_text()), report.toolchain(nvcc, arch)
    if key not in baseline:
        pytest.skip(f"the baseline knows {sorted(baseline)}, not {key}")
    rows = report.interior_rows(nvcc, arch, [head_dim])
    assert rows
    for row in rows:
        assert row in baseline[key]
        if head_dim <= 128:
            loop, scores = row["loop"], row["tile"][0] * row["tile"][1] // (32 * row["warps"])
            assert loop["per_score"] - loop["idle"] / scores <= MOST  # NOPs only wait for the tensor cores of sm_120


def test_head_dim_128_on_sm_80(nvcc):
    check(nvcc, 80, 128)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", report.HEAD_DIMS)
@pytest.mark.parametrize("arch", report.ARCHITECTURES)
def test_every_head_dim(nvcc, arch, head_dim):
    check(nvcc, arch, head_dim)


def test_every_tile_rescaled_is_right(emulated_module):
    """On the inputs that make every tile pass the one before by 2**16: the result, and that they do."""
    q, k, v = (x.double()[0, :, 0] for x in interior.inputs(128, rising=True))
    module = emulated_module("attention/sm80/instances/forward_bf16_d128")
    out, lse, counts = interior.emulate(module, 128, 64, rising=True)
    scores = q @ k.T * 128**-0.5
    exact = scores.softmax(-1) @ v
    assert (out[0, :, 0].double() - exact).abs().max() <= 2**-8 * exact.abs().max()
    torch.testing.assert_close(lse[0, 0].double(), scores.logsumexp(-1), rtol=1e-6, atol=0)
    shuffles = sum(row[4] for row in counts.instructions if row[0].startswith("shfl"))
    # Two for a row: its maximum in every one of 16 tiles, its total at the end. Four warps, four rows a thread.
    assert shuffles == 4 * 4 * 2 * (16 + 1)


# --- which block is which ---------------------------------------------------------------------------------------------


def block(*landmarks: tuple[str, int], to: list, executed: int | None = None) -> "interior.Block":
    """A block with instructions of some kinds at some lines; kind "" is no landmark."""
    found = [interior.Instruction(kind or "IADD", False, (("k.h", line),), kind or None) for kind, line in landmarks]
    return interior.Block(found, to, executed)


def two_sides():
    """A loop with a rare detour at block 2, as machine code and as counted PTX."""
    machine = [
        block(to=[1]), block(("product", 1), ("", 9), to=[3, 2]), block(("shuffle", 2), to=[3]),
        block(("exponential", 3), to=[1, 4]), block(to=[None]),
    ]  # fmt: skip
    ptx = [replace(b, executed=n) for b, n in zip(machine, (4, 64, 5, 64, 4), strict=True)]
    return machine, ptx


def test_counts_by_landmarks_and_flow():
    machine, ptx = two_sides()
    assert interior.block_counts(machine, ptx) == {1: 64, 2: 5, 3: 64}
    machine[2].instructions.clear()  # what has no landmark follows from the flow, or from its lines
    ptx[2].instructions.clear()
    with pytest.raises(interior.Unclear, match=r"blocks \[2\]"):
        interior.block_counts(machine, ptx)
    for side in machine, ptx:
        side[2].instructions.append(interior.Instruction("IADD", False, (("k.h", 7),), None))
    assert interior.block_counts(machine, ptx) == {1: 64, 2: 5, 3: 64}


@pytest.mark.parametrize(
    "place, landmark, what",
    [(3, ("product", 1), "product"), (2, ("exponential", 3), "differently"), (2, ("exponential", 8), "exponential")],
    ids=["one more", "of another block", "of no line"],
)
def test_what_does_not_match_is_refused(place, landmark, what):
    machine, ptx = two_sides()
    machine = [replace(b, instructions=list(b.instructions)) for b in machine]
    machine[place].instructions += block(landmark, to=[]).instructions
    with pytest.raises(interior.Unclear, match=what):
        interior.block_counts(machine, ptx)


def test_flow_must_hold():
    machine, ptx = two_sides()
    ptx[3].executed = 63
    with pytest.raises(interior.Unclear, match="entered or left"):
        interior.block_counts(machine, ptx)
