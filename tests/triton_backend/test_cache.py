"""begin_chunk, write and streaming attention of the Triton backend, in the interpreter or on a GPU."""

from __future__ import annotations

import grid
import pytest
import torch
from grid import LIVES, Life
from oracle import check, runs, uneven

import rfkernels as rf
from rfkernels import backends

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@pytest.mark.parametrize("number, life", list(enumerate(LIVES)), ids=[str(life) for life in LIVES])
def test_a_stream(device, number, life):
    """float32 and float16 in turns: every pair of the grid's values meets in one of them."""
    grid.run_life("triton", device, (torch.float32, torch.float16)[number % 2], life)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "life",
    [
        Life(2, 3, 2, 0.9, head_dim=128, group=4, batch=3, layers=2),
        Life(3, 3, 3, 0.999, head_dim=64, pairing="half", kv_heads=2, group=2),
    ],
    ids=str,
)
def test_a_stream_in_both_dtypes(device, dtype, life):
    grid.run_life("triton", device, dtype, life)


@pytest.mark.parametrize("sink_dtype", [None, torch.float16], ids=["wide_sink", "half_sink"])
def test_an_alpha_for_each_head(device, sink_dtype):
    grid.run_life("triton", device, torch.float16, Life(2, 2, 2, (0.5, 1.0), kv_heads=2, batch=3), sink_dtype)


@pytest.mark.parametrize("pairing", ["interleaved", None])
def test_published_arithmetic_in_half_precision(device, pairing):
    streams = grid.run_life("triton", device, torch.float16, Life(2, 2, 2, 0.7, pairing=pairing), torch.float16)
    assert torch.equal(streams.ours.v.isnan(), streams.plain.v.isnan())
    assert torch.equal(*(x.v.nan_to_num() for x in (streams.ours, streams.plain))), "averaged bit for bit as published"


def test_tokens_that_straddle_tiles_and_split_keys(device):
    """35 tokens a frame: tiles of queries lie in two frames, cache tiles end inside a frame, keys are split."""
    grid.run_life("triton", device, torch.float32, Life(1, 2, 2, size=(5, 7)))


@pytest.mark.parametrize("pairing", ["interleaved", "half", None])
def test_a_librarys_passes(device, monkeypatch, pairing):
    """torch's kernel attends to what these kernels have written, with queries that they have rotated."""
    monkeypatch.setattr(backends, "_choices", {})
    rows = dict.fromkeys(backends.OPERATIONS, (backends.Row("triton"),))
    monkeypatch.setitem(backends._AUTO, backends.family(device), rows)
    life = Life(1, 2, 2, 0.9, head_dim=64, batch=2, kv_heads=2, group=2, pairing=pairing)
    grid.run_life("library:torch_sdpa", device, torch.float32, life)


def test_only_some_streams_advance(device):
    streams = grid.stream("triton", device, torch.float32, 32, batch_size=3, num_layers=2, sink_frames=2)
    for samples in ([2], [1, 2], [2], [1, 2], [2], [0, 1, 2]):
        streams.begin(1, samples=samples)
        streams.write(1)
    streams.begin(2, samples=[2])
    streams.poison()
    streams.run_pass(1)  # sample 0 has one frame only: its first rows are empty
    streams.compare_cache()


def test_bfloat16_cache(device):
    """Without products: the interpreter's are wrong in bfloat16."""
    streams = grid.stream("triton", device, torch.bfloat16, 32, sink_frames=2)
    for _ in range(4):
        streams.begin(2)
        streams.write()
    streams.compare_cache(truncated=device.type == "cpu")  # the interpreter's conversion to bfloat16


def test_far_along(device):
    grid.run_far_along("triton", device, torch.float32, 32)


@pytest.mark.parametrize("given", DTYPES.values(), ids=DTYPES)
def test_float16_saturates(device, given):
    grid.run_saturated("triton", device, 32, given)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scale_may_be_negative_or_zero(device, scale):
    qkv = [uneven(1, 20, 1, 32, dtype=torch.float32, device=device) for _ in range(3)]
    results = []
    for backend, dtype in runs("triton", torch.float32):
        with rf.use_backend(backend):
            inputs = (x.to(dtype) for x in qkv)
            results.append(rf.sink_window_attention(*inputs, sink_tokens=2, window_tokens=9, scale=scale))
    check("out", *results, torch.float32)
