"""Every backend once, at a model's head size, against float64: what to run first on a new machine (seconds each).

Where there is no GPU the kernels run on the PTX emulator, as compiled for sm_80.
"""

from __future__ import annotations

import grid
import pytest
import torch

from rfkernels import backends

CASES = {
    # Tiles of queries and keys end inside frames; a window that wraps twice, sinks that are averaged.
    "life": grid.Life(2, 3, 2, 0.5, head_dim=128, group=2, size=(7, 11)),
    "chunk": grid.Chunk((1, 4), 1, 2, 2, head_dim=128, group=2, size=(7, 11)),
    "window": grid.Window(140, 140, 35, 70, chunk=35, pairing="half", size=(5, 7), head_dim=128),
    "loss": grid.Loss("elements", True, True, (2, 3, 4111)),
}


@pytest.fixture(params=["reference", "sdpa", "library", "triton", "cuda"])
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
