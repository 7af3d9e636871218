"""Tensors whose entries lie more than 2**31 elements apart: offsets that 32 bits do not hold."""

from __future__ import annotations

import far
import pytest
import torch

FP16, HEAD_DIM = torch.float16, 32


@pytest.mark.parametrize("dim", [0, 1, 3], ids=["layers", "samples", "heads"])
def test_a_stream(device, dim):
    far.run_life("triton", device, FP16, dim, HEAD_DIM)


@pytest.mark.parametrize("size, dim, stride", far.SIZES)
def test_attention_and_its_gradients(device, size, dim, stride):
    far.run_attention("triton", device, FP16, size, dim, stride, HEAD_DIM)


@pytest.mark.parametrize("size, dim, stride", far.SIZES)
def test_incoming_gradients(device, size, dim, stride):
    far.run_incoming("triton", device, FP16, size, dim, stride, HEAD_DIM)
