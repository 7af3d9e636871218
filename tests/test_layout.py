"""Which tensors kernels read in place, and which are copied."""

import pytest
import torch

from rfkernels.backends.layout import FARTHEST_TOKENS, aligned_rows


def heads(*size: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.arange(torch.Size(size).numel()).to(dtype).view(size)


@pytest.mark.parametrize(
    "x, in_place",
    [
        (heads(1, 4, 2, 32), True),
        (heads(1, 4, 2, 32).transpose(1, 2), True),
        (heads(1, 4, 3, 32)[:, :, 1:], True),
        (heads(1, 4, 2, 40)[..., 8:], True),
        (heads(1, 4, 2, 12), False),  # rows of 24 bytes
        (heads(260)[4:].view(1, 4, 2, 32), False),  # begins at 8 bytes
        (heads(264)[8:].view(1, 4, 2, 32), True),
        (heads(1, 4, 2, 36)[..., :32], False),
        (heads(1, 4, 2, 64)[..., ::2], False),
        (heads(64).as_strided((1, 1, 2, 32), (64, FARTHEST_TOKENS, 32, 1)), False),  # one token, said to be far away
    ],
)
def test_aligned_rows(x, in_place):
    found = aligned_rows(x)
    assert torch.equal(found, x) and (found.data_ptr() == x.data_ptr()) == in_place
    assert found.stride(-1) == 1 and found.storage_offset() * 2 % 16 == 0
