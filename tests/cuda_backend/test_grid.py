"""The grid of cases under the CUDA backend, through the public functions: on a GPU, or on the PTX emulator."""

from __future__ import annotations

import grid
import pytest
import torch

import rfkernels as rf

HEAD_DIMS = (64, 80, 128)
DTYPES = (torch.bfloat16, torch.float16)


def spread(cases: list, every: int) -> list:
    """All cases, head sizes and dtypes in turn; all but each ``every``-th are slow."""
    chosen = []
    for index, case in enumerate(cases):
        dtype = DTYPES[index // len(HEAD_DIMS) % 2]
        case = case._replace(head_dim=HEAD_DIMS[index % len(HEAD_DIMS)])
        marks = () if index % every == 0 else pytest.mark.slow
        chosen.append(pytest.param(dtype, case, marks=marks, id=f"{str(dtype)[6:]}-{case}"))
    return chosen


LARGE = [grid.Life(2, 3, 2, head_dim=head_dim, group=2, size=(3, 5)) for head_dim in (96, 256)]


@pytest.mark.parametrize(("dtype", "life"), spread(grid.LIVES, 8))
def test_a_stream(device, dtype, life):
    grid.run_life("cuda", device, dtype, life)


@pytest.mark.parametrize("life", LARGE, ids=str)
def test_a_stream_of_other_head_sizes(device, life):
    grid.run_life("cuda", device, torch.bfloat16, life)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_published_arithmetic_in_half_precision(device, dtype):
    life = grid.Life(2, 3, 2, alpha=0.7, head_dim=64, size=(3, 5))  # no product is exact
    streams = grid.run_life("cuda", device, dtype, life, sink_dtype=dtype)
    assert torch.equal(streams.ours.v, streams.plain.v), "values are averaged bit for bit as published"


def test_an_alpha_for_each_head(device):
    """Three frames at a time into two slots, in streams that do not all advance."""
    life = grid.Life(2, 3, 3, (0.5, 1.0), head_dim=64, batch=3, layers=2, kv_heads=2)
    grid.run_life("cuda", device, torch.bfloat16, life)


def test_far_along(device):
    grid.run_far_along("cuda", device, torch.bfloat16, 64)


@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=str)
def test_float16_saturates(device, given):
    grid.run_saturated("cuda", device, 64, given)


@pytest.mark.parametrize(("dtype", "case"), spread(grid.CHUNKS, 8))
def test_chunk_attention(device, dtype, case):
    grid.run_chunk("cuda", device, dtype, case)


@pytest.mark.parametrize(("dtype", "case"), spread(grid.WINDOWS, 12))
def test_sink_window_attention(device, dtype, case):
    grid.run_window("cuda", device, dtype, case)


@pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "sm_90a"])
@pytest.mark.parametrize("use", ["prefix", "chunk", "window"])
def test_whole_tiles_and_a_tail(device, emulated, use, hopper):
    """On eight processors, which hold two blocks each, or one of Hopper's: one tile more than they hold."""
    if emulated is None:
        pytest.skip("the number of processors is the GPU's")
    with emulated.capability(90 if hopper else 80):
        grid.run_tail("cuda", device, torch.bfloat16, use, 9 if hopper else 17)
    assert [name.startswith("rf_attention_merge") for name, _ in emulated.launches].count(True) == 1


HOPPER_CASES = {
    "stream": (grid.run_life, grid.Life(2, 3, 2, head_dim=64, group=2, size=(3, 5))),
    "chunk": (grid.run_chunk, grid.Chunk((5, 7), 2, 3, 2, head_dim=128, group=2)),
    "window": (grid.run_window, grid.WITHIN_A_FRAME._replace(head_dim=64)),
}


@pytest.mark.parametrize(("run", "case"), HOPPER_CASES.values(), ids=HOPPER_CASES)
def test_the_kernels_of_hopper(device, emulated, run, case):
    """Compute capability 9.0 takes them for every forward."""
    if emulated is None:
        pytest.skip("here the GPU decides")
    with emulated.capability(90):
        run("cuda", device, torch.bfloat16, case)
    forwards = {name for name, _ in emulated.launches if name.startswith("rf_attention_forward")}
    assert forwards == {f"rf_attention_forward_hopper_bf16_d{case.head_dim}"}


@pytest.mark.parametrize("case", grid.LOSSES, ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float32], ids=str)
def test_redmd_loss(device, dtype, case):
    grid.run_loss("cuda", device, dtype, case)


def test_it_refuses_what_it_has_no_kernels_for(device):
    x = torch.randn(1, 8, 1, 64, device=device)
    with rf.use_backend("cuda"), pytest.raises(ValueError, match=r"float16 and bfloat16.*got torch.float32"):
        rf.sink_window_attention(x, x, x, sink_tokens=1, window_tokens=2)
    x = torch.randn(1, 8, 1, 48, device=device, dtype=torch.bfloat16)
    with rf.use_backend("cuda"), pytest.raises(ValueError, match=r"head_dim .*64.*got 48"):
        rf.sink_window_attention(x, x, x, sink_tokens=1, window_tokens=2)


def test_launches_of_a_backward(device, emulated):
    """Queries are rotated for their window and for the sinks outside it; gradients take the dtypes of their inputs."""
    rope = rf.Rope3D(64, 2, 3)
    q, k, v = (
        torch.randn(1, 60, 1, 64, device=device).to(dtype) for dtype in (torch.float64, torch.float32, DTYPES[0])
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with rf.use_backend("cuda"):
        out = rf.sink_window_attention(*leaves, sink_tokens=6, window_tokens=12, chunk_tokens=6, rope=rope)
        if emulated:
            emulated.launches.clear()
        out.sum().backward()
    assert [x.grad.dtype for x in leaves] == [x.dtype for x in leaves]
    if emulated:
        names = [name for name, _ in emulated.launches]
        kernels = [f"rf_attention_{name}" for name in ("delta_bf16", "grad_q_bf16_d64", "grad_kv_bf16_d64")]
        assert names == ["rf_rotate"] * 3 + kernels
