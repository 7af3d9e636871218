"""begin_chunk, write and streaming attention of the Triton backend, in the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

import rfkernels as rf

from .oracle import Streams, check, uneven

TOKENS = 6


def rope(head_dim: int = 32, pairing: str = "interleaved", height: int = 2, width: int = 3) -> rf.Rope3D:
    return rf.Rope3D(head_dim, height, width, pairing=pairing)


# sinks, window, frames of each chunk, alpha, sink positions: N < S, warm-up, exactly full, many wraps; F above, at and
# below S and W.
LIVES = [
    (0, 1, (1, 1, 1), 0.5, "before_window"),
    (0, 3, (3, 2, 3), 0.999, "before_window"),
    (1, 1, (1, 1, 1, 1), 0.0, "before_window"),
    (1, 3, (2, 2, 3, 1, 3), 0.5, "absolute"),
    (2, 3, (3, 2, 3, 3, 2), 0.999, "before_window"),
    (2, 3, (1, 1, 2, 3, 3), 1.0, "before_window"),
    (2, 6, (5, 3, 5), 0.5, "before_window"),
    (3, 3, (3, 3, 3, 3), 0.999, "before_window"),
    (3, 3, (2, 3, 1, 3), 1.0, "absolute"),
    (3, 6, (5, 5, 5), 0.5, "absolute"),
    (3, 1, (1, 1, 1, 1, 1, 1), 0.5, "before_window"),
]


@pytest.mark.parametrize(("sinks", "window", "chunks", "alpha", "positions"), LIVES)
def test_a_stream(device, sinks, window, chunks, alpha, positions):
    streams = Streams(
        device, torch.float32, rope(), num_layers=1, batch_size=1, num_kv_heads=1, frame_tokens=TOKENS,
        sink_frames=sinks, window_frames=window, alpha=alpha, sink_positions=positions,
    )  # fmt: skip
    for index, frames in enumerate(chunks):
        streams.begin(frames)
        streams.poison()
        if index % 2:
            streams.write()
        else:
            streams.run_pass()
    streams.begin(1, replace=1)
    streams.run_pass()
    for cache in (streams.ours, streams.plain, streams.exact):
        for x in (cache.k, cache.v):
            x.nan_to_num_(0)
    streams.compare_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim, pairing, group", [(48, "half", 2), (64, "half", 1), (128, "interleaved", 4)])
def test_heads(device, dtype, head_dim, pairing, group):
    streams = Streams(
        device, dtype, rope(head_dim, pairing), num_layers=2, batch_size=1, num_kv_heads=1, frame_tokens=TOKENS,
        sink_frames=1, window_frames=2, alpha=0.5,
    )  # fmt: skip
    for frames in (2, 2, 1):
        streams.begin(frames)
        for layer in range(2):
            streams.run_pass(layer, group)
    streams.compare_cache()


def test_streams_of_different_ages_and_alpha_per_head(device):
    streams = Streams(
        device, torch.float32, rope(), num_layers=2, batch_size=3, num_kv_heads=2, frame_tokens=TOKENS,
        sink_frames=2, window_frames=2, alpha=(0.5, 1.0),
    )  # fmt: skip
    for samples in ([2], [1, 2], [2], [1, 2], [2], [0, 1, 2]):
        streams.begin(1, samples=samples)
        streams.write(1)
    streams.begin(2, samples=[2])
    streams.poison()
    streams.run_pass(1)  # sample 0 has one frame only: its first rows are empty
    for cache in (streams.ours, streams.plain, streams.exact):
        for x in (cache.k, cache.v):
            x.nan_to_num_(0)
    streams.compare_cache()


@pytest.mark.parametrize("with_rope", [True, False], ids=["rope", "no_rope"])
def test_published_arithmetic_in_half_precision(device, with_rope):
    streams = Streams(
        device, torch.float16, rope() if with_rope else None, num_layers=1, batch_size=1, num_kv_heads=1,
        frame_tokens=TOKENS, sink_frames=2, window_frames=2, alpha=0.75, sink_dtype=torch.float16,
    )  # fmt: skip
    for _ in range(5):
        streams.begin(2)
        streams.write()
    assert torch.equal(streams.ours.v, streams.plain.v), "values are averaged bit for bit as published"
    streams.compare_cache()


def test_bfloat16_cache(device):
    """Without products: the interpreter's are wrong in bfloat16."""
    streams = Streams(
        device, torch.bfloat16, rope(), num_layers=1, batch_size=1, num_kv_heads=1, frame_tokens=TOKENS,
        sink_frames=2, window_frames=2, alpha=0.5,
    )  # fmt: skip
    for _ in range(4):
        streams.begin(2)
        streams.write()
    streams.compare_cache()


def test_tokens_that_straddle_tiles_and_split_keys(device):
    """35 tokens a frame: tiles of queries lie in two frames, cache tiles end inside a frame, keys are split."""
    streams = Streams(
        device, torch.float32, rope(height=5, width=7), num_layers=1, batch_size=1, num_kv_heads=1, frame_tokens=35,
        sink_frames=1, window_frames=2, alpha=0.5,
    )  # fmt: skip
    for frames in (2, 2):
        streams.begin(frames)
        streams.run_pass()
    streams.compare_cache()


def test_far_along(device):
    """Phases at frame 10**6 are as good as at frame 0."""
    streams = Streams(
        device, torch.float32, rope(), num_layers=1, batch_size=1, num_kv_heads=1, frame_tokens=TOKENS, sink_frames=1,
        window_frames=2, alpha=0.5,
    )  # fmt: skip
    for _, cache, _ in streams.runs():
        cache.num_frames += 10**6
        cache._set_ages([10**6])
    streams.begin(2)
    streams.run_pass()
    streams.compare_cache()


def test_float16_saturates(device):
    streams = Streams(
        device, torch.float16, rope(), num_layers=1, batch_size=1, num_kv_heads=1, frame_tokens=TOKENS, sink_frames=1,
        window_frames=2, alpha=0.5,
    )  # fmt: skip
    big = torch.full((1, 2 * TOKENS, 1, 32), 60000.0, device=device)
    streams.begin(2)
    for backend, cache, _ in streams.runs():
        with rf.use_backend(backend):
            cache[0].write(big, big * 2)
    assert streams.ours.k.abs().max() == 65504 and streams.ours.v.max() == 65504
    assert torch.equal(streams.ours.v, streams.plain.v)


def test_scale_may_be_negative_or_zero(device):
    for scale in (-0.3, 0.0):
        q, k, v = (uneven(1, 20, 1, 32, dtype=torch.float32, device=device) for _ in range(3))
        results = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
            with rf.use_backend(backend):
                results.append(
                    rf.sink_window_attention(
                        *(x.to(dtype) for x in (q, k, v)), sink_tokens=2, window_tokens=9, scale=scale
                    )
                )
        check("out", *results, torch.float32)
