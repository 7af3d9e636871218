"""Every backend once, at a model's head size, against float64: what to run first on a new machine (seconds each).

Where there is no GPU the kernels run on the PTX emulator, as compiled for sm_80.
"""

from __future__ import annotations

import grid
import oracle
import pytest
import torch

import rfkernels as rf
from rfkernels import backends
from rfkernels.backends import library

CASES = {
    # Tiles of queries and keys end inside frames; a window that wraps twice, sinks that are averaged.
    "life": grid.Life(2, 3, 2, 0.5, head_dim=128, group=2, size=(7, 11)),
    "chunk": grid.Chunk((1, 4), 1, 2, 2, head_dim=128, group=2, size=(7, 11)),
    "window": grid.Window(140, 140, 35, 70, chunk=35, pairing="half", size=(5, 7), head_dim=128),
    "loss": grid.Loss("elements", True, True, (2, 3, 4111)),
}


@pytest.fixture(params=["reference", "sdpa", "triton", "cuda"])
def backend(request, device):
    name = request.param
    reason = backends.module(name).unavailable(device)
    if device.type == "cuda" or reason is None:
        if reason:
            pytest.skip(reason)
        yield name
        return
    if name == "triton":
        pytest.importorskip("triton")
        from emulated import on_emulator, unavailable

        context = (80,)
    else:
        from cuda_backend.emulated import on_emulator, unavailable

        context = ()
    if reason := unavailable():
        pytest.skip(reason)
    with on_emulator(*context):
        yield name


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float16, torch.float32))],
    ids=str,
)
def test_against_float64(backend, device, dtype, kind):
    getattr(grid, f"run_{kind}")(backend, device, dtype, CASES[kind])


@pytest.mark.parametrize("kernel", library.KERNELS, ids=lambda kernel: kernel.name)
def test_library_against_float64(kernel, device):
    """The kernels of other packages that are installed, in bfloat16; those that quantise have no budget."""
    name = f"{library.NAME}:{kernel.name}"
    if reason := backends.module(name).unavailable(device):
        pytest.skip(reason)
    if not kernel.quantises:
        grid.run_life(name, device, torch.bfloat16, CASES["life"])
        return
    streams = oracle.Streams(
        name, device, torch.bfloat16, rf.Rope3D(128, 7, 11), num_layers=1, batch_size=2, num_kv_heads=2,
        frame_tokens=77, sink_frames=1, window_frames=3, alpha=0.5,
    )  # fmt: skip
    for _ in range(6):
        streams.begin(1)
        streams.write()
    qkv, results = streams.inputs(4), []
    for run, cache, dtype in streams.runs():
        with rf.use_backend(run):
            results.append(rf.streaming_attention(*(x.to(dtype) for x in qkv), cache[0], return_lse=True))
    (out, lse), _, (exact_out, exact_lse) = results
    assert (out - exact_out).norm() < 0.1 * exact_out.norm()  # another key, scale or layout would change all of it
    assert (lse - exact_lse).abs().max() < 0.1
