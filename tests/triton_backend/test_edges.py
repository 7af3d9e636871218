"""Lengths at tiles' edges under the Triton backend, with the normaliser held to float32's error: each third case."""

from __future__ import annotations

import edges
import pytest
import torch


@pytest.mark.parametrize("case, slope", edges.in_turns(edges.WINDOWS[::3]))
def test_windows(device, case, slope):
    edges.run_window("triton", device, torch.float16, case, slope)


@pytest.mark.parametrize("chunk", [False, True], ids=["pass", "chunk"])
@pytest.mark.parametrize("case, slope", edges.in_turns(edges.STREAMS[::3]))
def test_streams(device, case, chunk, slope):
    edges.run_stream("triton", device, torch.float16, case, slope, chunk)


@edges.BOTH
def test_gradients(device, slope):
    edges.run_gradients("triton", device, torch.float16, edges.GRADIENTS[32], slope)


def test_weights_are_rounded_to_the_nearest(device):
    edges.run_constant("triton", device, torch.float16)


def test_nothing_is_truncated(device):
    edges.run_unbiased("triton", device, torch.float16, keys=192)
