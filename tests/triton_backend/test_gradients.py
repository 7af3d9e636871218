"""Chunk and sink-window attention of the Triton backend with their gradients, and the Re-DMD loss."""

from __future__ import annotations

import grid
import pytest
import torch
from grid import CHUNKS, LOSSES, WINDOWS, Loss, Window
from oracle import uneven

import rfkernels as rf


def in_turns(cases):
    """Cases in float32 and float16 in turns, with ids."""
    dtypes = (("fp32", torch.float32), ("fp16", torch.float16))
    for number, case in enumerate(cases):
        name, dtype = dtypes[number % 2]
        yield pytest.param(case, dtype, id=f"{case}-{name}")


@pytest.mark.parametrize("case, dtype", list(in_turns(WINDOWS)))
def test_sink_window_attention(device, case, dtype):
    grid.run_window("triton", device, dtype, case)


@pytest.mark.parametrize("case, dtype", list(in_turns(CHUNKS)))
def test_chunk_attention(device, case, dtype):
    grid.run_chunk("triton", device, dtype, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_redmd_loss(device, case, dtype):
    grid.run_loss("triton", device, dtype, case)


def test_results_repeat_bit_for_bit(device):
    qkv = [uneven(1, 40, 1, 32, dtype=torch.float32, device=device).requires_grad_() for _ in range(3)]
    runs = []
    for _ in range(2):
        with rf.use_backend("triton"):
            out = rf.sink_window_attention(*qkv, sink_tokens=3, window_tokens=10)
        runs.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_spans_of_several_blocks(device, monkeypatch):
    """Of the loss: what a program sums up where samples are large, here with two programs for three blocks."""
    from rfkernels.backends.triton import loss

    monkeypatch.setattr(loss, "_PROGRAMS", 2)
    grid.run_loss("triton", device, torch.float32, Loss("elements", True, True, (2, 3, 4000)))


def test_an_output_that_is_not_written_is_caught(device, monkeypatch):
    """The last program of a launch is lost, whose keys nobody sees: their gradients are zeros, all the same written."""
    from rfkernels.backends.triton import backward

    class Shortened:
        def __getitem__(self, size):
            return whole[(size[0] - 1,)]

    case = Window(40, 40, 0, 20, chunk=8, own=False)  # float32 tiles hold 32 keys
    grid.run_window("triton", device, torch.float32, case)
    whole = backward.grad_kv_kernel
    monkeypatch.setattr(backward, "grad_kv_kernel", Shortened())
    with pytest.raises(AssertionError, match="grad_k: isnan at other places"):
        grid.run_window("triton", device, torch.float32, case)
