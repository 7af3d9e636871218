"""Tensors whose entries lie more than 2**31 elements apart: offsets that 32 bits do not hold."""

from __future__ import annotations

import contextlib

import far
import pytest
import torch

BF16, HEAD_DIM = torch.bfloat16, 64


@pytest.mark.parametrize("dim", [0, 1, 3], ids=["layers", "samples", "heads"])
def test_a_stream(device, dim):
    far.run_life("cuda", device, BF16, dim, HEAD_DIM)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("size, dim, stride", far.SIZES)
def test_attention_and_its_gradients(device, emulated, size, dim, stride, capability):
    with contextlib.nullcontext() if emulated is None else emulated.capability(capability):  # a GPU has its own
        far.run_attention("cuda", device, BF16, size, dim, stride, HEAD_DIM)


@pytest.mark.parametrize("size, dim, stride", far.SIZES)
def test_incoming_gradients(device, size, dim, stride):
    far.run_incoming("cuda", device, BF16, size, dim, stride, HEAD_DIM)
