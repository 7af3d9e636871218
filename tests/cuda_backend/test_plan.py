"""How the host code launches attention on GPUs of several sizes: kernel, tiles, grid. Nothing is executed."""

from __future__ import annotations

import re

import pytest
import torch

from rfkernels.backends import cuda
from rfkernels.backends.cuda import compiled
from rfkernels.backends.cuda.requests import NO_MASK, AttentionForward, Keys
from rfkernels.contract.geometry import WindowMask
from rfkernels.contract.requests import Cotangents, WindowAttention, WindowGradients

KB = 1 << 10
GPUS = {  # multiprocessors, bytes of shared memory of one, and what one block may have of them
    "A100": (108, 164 * KB, 163 * KB),
    "RTX 3090": (82, 100 * KB, 99 * KB),
    "H100": (132, 228 * KB, 227 * KB),
    "RTX 5090": (170, 100 * KB, 99 * KB),
}
ROWS = 128  # queries of a block
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def only_emulated(emulated):
    if emulated is None:
        pytest.skip("a GPU launches what it is given; plans for other GPUs need the emulated runtime")


def forward(emulated, gpu: str, queries: int, keys: int, *, batch=1, heads=1, head_dim=128, dtype=BF16, mask=None):
    """The plans of one forward over a cache's prefix, or with a mask of a full sequence."""
    q = torch.empty(batch, queries, heads, head_dim, dtype=dtype)
    k = torch.empty(batch, keys, heads, head_dim, dtype=dtype)
    with emulated.planning(*GPUS[gpu][:2]) as plans:
        if mask is None:
            frames = torch.zeros(batch, dtype=torch.int64)
            compiled.attention_forward(AttentionForward(q, Keys(k, k, None, None, frames, 1, keys, NO_MASK), None, 0.1))
        else:
            cuda.sink_window_attention(WindowAttention(q, k, k, mask, None, 0.1))
    return plans


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_the_tile_fits_the_multiprocessor(emulated, gpu, dtype, head_dim):
    """Two blocks of up to 128 columns, one of 256, with the tiles that the kernel's config has."""
    plan, _ = forward(emulated, gpu, 4680, 14040, heads=12, head_dim=head_dim, dtype=dtype)
    small = GPUS[gpu][1] < 128 * KB and head_dim == 128
    keys = 32 if small or head_dim == 256 else 64
    short = "bf16" if dtype is BF16 else "fp16"
    assert plan.kernel == f"rf_attention_forward_{short}_d{head_dim}{'_k32' if small else ''}"
    assert plan.threads == (256 if head_dim == 256 else 128)
    assert plan.shared_bytes == 2 * head_dim * (ROWS + 2 * keys) + 32
    blocks, reserved = (1 if head_dim == 256 else 2), KB  # which the driver keeps of every block's
    assert plan.shared_bytes <= GPUS[gpu][2] and blocks * (plan.shared_bytes + reserved) <= GPUS[gpu][1]


MERGE = "rf_attention_merge_bf16"
# Queries, keys, samples and heads; for each of GPUS whole tiles of queries, and blocks that share the keys of the rest.
PLANS = {
    (4680, 14040, 1, 12): ((432, 16), (328, 7), (264, 4), (340, 3)),  # the paper's pass
    (64, 14040, 1, 1): ((0, 16), (0, 16), (0, 16), (0, 16)),
    (1, 4096, 1, 8): ((0, 13), (0, 10), (0, 16), (0, 16)),
    (130, 1000, 2, 3): ((0, 6), (0, 6), (0, 6), (0, 11)),
    (768, 2304, 1, 12): ((0, 3), (0, 2), (0, 3), (0, 4)),  # on an H100 216 of the 264 blocks it holds
    (1560, 14040, 1, 4): ((0, 4), (0, 3), (0, 5), (0, 6)),
    (128, 128, 1, 1): ((1, 1), (1, 1), (1, 1), (1, 1)),
    (128, 255, 1, 1): ((1, 1), (1, 1), (1, 1), (1, 1)),  # less than two tiles of 64 for each of two
    (128, 256, 1, 1): ((1, 1), (0, 4), (1, 1), (0, 4)),  # tiles of 32
    (1, 1, 1, 1): ((1, 1), (1, 1), (1, 1), (1, 1)),
}


@pytest.mark.parametrize("shape", PLANS, ids=str)
@pytest.mark.parametrize("gpu", GPUS)
def test_blocks_share_the_keys_of_what_no_wave_fills(emulated, gpu, shape):
    """One launch for whole tiles and shares; one more joins the shares, of 128 rows each, eight rows a block."""
    queries, keys, batch, heads = shape
    plan, *merge = forward(emulated, gpu, queries, keys, batch=batch, heads=heads)
    whole, shares = PLANS[shape][list(GPUS).index(gpu)]
    tail = -(-queries // ROWS) * heads * batch - whole
    assert plan.grid == (whole + tail * shares, 1)
    assert [(x.kernel, x.grid) for x in merge] == ([(MERGE, (tail * 16, 1))] if tail else [])


def test_the_window_and_not_the_sequence_decides(emulated):
    """A token decoded at the end of a long sequence sees its window and the sinks: nothing to share among 16."""
    (plan,) = forward(emulated, "A100", 1, 100_000, mask=WindowMask(4, 200, 1, 1, True))
    assert plan.grid == (1, 1)
    plan, _ = forward(emulated, "A100", 1, 100_000, mask=WindowMask(4, 2**40, 1, 1, True))
    assert plan.grid == (16, 1)


@pytest.mark.parametrize("sizes", [{"queries": 0, "keys": 64}, {"queries": 8, "keys": 64, "batch": 0}], ids=str)
def test_nothing_to_do_is_no_launch(emulated, sizes):
    assert forward(emulated, "A100", **sizes) == []


def backward(emulated, queries: int, keys: int, heads: int, kv_heads: int, head_dim: int):
    q, out = (torch.empty(1, queries, heads, head_dim, dtype=BF16) for _ in range(2))
    k, lse = torch.empty(1, keys, kv_heads, head_dim, dtype=BF16), torch.empty(1, heads, queries)
    with emulated.planning(*GPUS["A100"][:2]) as plans:
        given = Cotangents(out, lse, out, lse)
        request = WindowAttention(q, k, k, WindowMask(4, 64, 1, 1, True), None, 0.1)
        cuda.sink_window_attention_backward(WindowGradients(given, request))
    return plans


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_a_backward_is_three_launches(emulated, head_dim):
    """Rows to two numbers, then blocks that own queries, then blocks that own keys; all within 100 KB."""
    plans = backward(emulated, 1000, 1500, 6, 2, head_dim)
    assert [re.sub(r"_bf16.*", "", x.kernel) for x in plans] == [
        f"rf_attention_{x}" for x in ("delta", "grad_q", "grad_kv")
    ]
    own = 64 if head_dim == 256 else 128
    assert [x.grid for x in plans] == [(-(-6000 // 32), 1), (-(-1000 // own) * 6, 1), (-(-1500 // own) * 2, 1)]
    assert all(x.shared_bytes <= 99 * KB for x in plans)


def test_a_backward_with_nothing_to_do(emulated):
    assert backward(emulated, 0, 64, 1, 1, 64) == []
