"""Rotary tables: the published split, other conventions, given frequencies."""

import math

import pytest
import torch
from literal import rotate as literal_rotate

import rfkernels as rf
from rfkernels.backends import reference


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("head_dim", [2, 16, 128])
def test_equals_complex_multiplication(head_dim, pairing, device):
    rope = rf.Rope3D(head_dim, 3, 5, theta=1000.0, pairing=pairing)
    x, frames = torch.randn(15 * 4, 2, head_dim, dtype=torch.float64), [7, 3, 100, 0]
    got = reference.rotate(
        x[None].to(device), torch.tensor([frames], device=device), rope.tables(device, torch.float64)
    )
    expected = literal_rotate(x, frames, 3, 5, 1000.0, pairing == "half")
    torch.testing.assert_close(got[0].cpu(), expected, rtol=1e-12, atol=1e-12)


def test_default_split_and_frequencies():
    rope = rf.Rope3D(128, 30, 52)
    assert rope.split == (22, 21, 21) and rope.frame_tokens == 1560
    torch.testing.assert_close(rope.frequencies[1][3].item(), 10000.0 ** (-3 / 21))
    assert rf.Rope3D(128).split == (64, 0, 0) and rf.Rope3D(128).frame_tokens is None


def test_given_frequencies_replace_theta():
    frequencies = torch.tensor([1.0, 0.25, 0.01, 0.0])
    rope = rf.Rope3D(8, frequencies=frequencies)
    x = torch.randn(1, 3, 1, 8, dtype=torch.float64)
    got = reference.rotate(x, torch.tensor([[0, 5, 9]]), rope.tables(x.device, x.dtype))
    angle = 5 * 0.25
    a, b = x[0, 1, 0, 2], x[0, 1, 0, 3]
    torch.testing.assert_close(got[0, 1, 0, 2], a * math.cos(angle) - b * math.sin(angle))
    torch.testing.assert_close(got[..., 6:], x[..., 6:])
    axes = (frequencies[:2], frequencies[2:3], frequencies[3:])
    assert rf.Rope3D(8, 2, 2, frequencies=axes).split == (2, 1, 1)
    assert rf.Rope3D(8, frequencies=frequencies) == rope != rf.Rope3D(8)


def test_inverse_undoes_a_rotation_and_first_token_shifts():
    rope = rf.Rope3D(16, 2, 3)
    tables = rope.tables(torch.device("cpu"), torch.float64)
    x, frames = torch.randn(2, 12, 1, 16, dtype=torch.float64), torch.tensor([[4, 5], [100, 101]])
    turned = reference.rotate(x, frames, tables)
    torch.testing.assert_close(reference.rotate(turned, frames, tables, inverse=True), x)
    per_token = torch.tensor([[4] * 6 + [5] * 6, [100] * 6 + [101] * 6])
    tail = reference.rotate(x[:, 4:], per_token[:, 4:], tables, first_token=4)
    torch.testing.assert_close(tail, turned[:, 4:])


BAD = [
    (dict(head_dim=7), ValueError, "head_dim must be even and positive, got 7"),
    (dict(head_dim=8, height=2), ValueError, "height and width go together, got height=2, width=None"),
    (dict(head_dim=8, height=0, width=2), ValueError, "height and width must be at least 1"),
    (dict(head_dim=8, pairing="odd"), ValueError, "pairing must be .* got 'odd'"),
    (dict(head_dim=8, theta=-1), ValueError, "theta must be positive, got -1"),
    (dict(head_dim=8, height=2, width=2, split=(1, 1, 1)), ValueError, r"sum to head_dim / 2 = 4, got \(1, 1, 1\)"),
    (dict(head_dim=8, split=(2, 1, 1)), ValueError, "split gives pairs to rows or columns"),
    (dict(head_dim=8, frequencies=[1, 2]), TypeError, "frequencies must be 1-D floating-point tensors"),
    (dict(head_dim=8, frequencies=torch.ones(3)), ValueError, "split must be three counts"),
    (dict(head_dim=8, frequencies=(torch.ones(2),) * 2), ValueError, "one axis .* or three, got 2"),
]


@pytest.mark.parametrize("options, error, message", BAD)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        rf.Rope3D(**options)
