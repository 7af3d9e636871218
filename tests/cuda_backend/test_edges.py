"""Lengths at the edges of tiles under the CUDA backend, with the normaliser held to float32's error."""

from __future__ import annotations

import contextlib

import edges
import pytest
import torch

each_kernel = pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "sm_90a"])


def kernels(emulated, hopper: bool):
    """Those of Hopper, or the others; on a GPU there is no choice."""
    if emulated is not None:
        return emulated.capability(90 if hopper else 80)
    if hopper:
        pytest.skip("here the GPU decides")
    return contextlib.nullcontext()


@each_kernel
@pytest.mark.parametrize("case, slope", [*edges.in_turns(edges.WINDOWS), *edges.falling(edges.FIRST_KEYS)])
def test_windows(device, emulated, case, slope, hopper):
    with kernels(emulated, hopper):
        edges.run_window("cuda", device, torch.bfloat16, case, slope)


@each_kernel
@pytest.mark.parametrize("chunk", [False, True], ids=["pass", "chunk"])
@pytest.mark.parametrize("case, slope", edges.in_turns(edges.STREAMS))
def test_streams(device, emulated, case, chunk, slope, hopper):
    with kernels(emulated, hopper):
        edges.run_stream("cuda", device, torch.bfloat16, case, slope, chunk)


@edges.BOTH
def test_gradients(device, slope):
    edges.run_gradients("cuda", device, torch.bfloat16, edges.GRADIENTS[128], slope)


@each_kernel
def test_weights_are_rounded_to_the_nearest(device, emulated, hopper):
    with kernels(emulated, hopper):
        edges.run_constant("cuda", device, torch.bfloat16)


def test_nothing_is_truncated(device):
    edges.run_unbiased("cuda", device, torch.bfloat16)
