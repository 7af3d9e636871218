"""Chunk and sink-window attention of the Triton backend with their gradients, and the Re-DMD loss."""

from __future__ import annotations

import pytest
import torch

import rfkernels as rf

from .oracle import check, uneven

RUNS = ("triton", None), ("reference", None), ("reference", torch.float64)


def compare(function, qkv: list[torch.Tensor], dtype: torch.dtype) -> None:
    """``function(backend index, q, k, v) -> out, lse``: both and all gradients, through both, under the three runs."""
    results, weights = [], None
    for index, (backend, wide) in enumerate(RUNS):
        inputs = [x.detach().to(wide or dtype).requires_grad_() for x in qkv]
        with rf.use_backend(backend):
            out, lse = function(index, *inputs)
        seen = lse.isfinite()
        if weights is None:
            weights = [torch.randn(x.shape, device=x.device) for x in (out, lse)]
        loss = (out * weights[0].to(out.dtype)).sum() + (torch.where(seen, lse, 0) * weights[1].to(lse.dtype)).sum()
        results.append([out, lse, *torch.autograd.grad(loss, inputs)])
    for name, *triple in zip(("out", "lse", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        check(name, *triple, dtype)


# queries, keys, sink, window, chunk, first chunk, own chunk, rope's pairing, group, head_dim
WINDOWS = [
    (70, 70, 5, 20, 1, 1, True, None, 1, 32),
    (33, 70, 40, 10, 1, 1, True, None, 4, 32),
    (66, 66, 0, 100, 7, 3, True, None, 1, 48),
    (60, 60, 12, 24, 12, 12, True, "interleaved", 2, 32),
    (48, 72, 12, 24, 12, 6, True, "half", 1, 48),
    (60, 60, 6, 12, 12, 6, False, "interleaved", 1, 32),
    (90, 90, 18, 18, 18, 6, True, "half", 1, 128),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_sink_window_attention(device, case, dtype):
    queries, keys, sink, window, chunk, first, own, pairing, group, head_dim = case
    rope = pairing and rf.Rope3D(head_dim, 2, 3, pairing=pairing)
    qkv = [uneven(1, n, h, head_dim, dtype=dtype, device=device) for n, h in ((queries, group), (keys, 1), (keys, 1))]
    compare(
        lambda _, q, k, v: rf.sink_window_attention(
            q, k, v, sink_tokens=sink, window_tokens=window, chunk_tokens=chunk, first_chunk_tokens=first,
            own_chunk=own, rope=rope, return_lse=True,
        ),
        qkv, dtype,
    )  # fmt: skip


def test_one_dimensional_rope(device):
    rope = rf.Rope3D(32, pairing="half")
    qkv = [uneven(1, 50, 1, 32, dtype=torch.float32, device=device) for _ in range(3)]
    compare(
        lambda _, q, k, v: rf.sink_window_attention(
            q, k, v, sink_tokens=4, window_tokens=12, rope=rope, return_lse=True
        ),
        qkv, torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize(
    "ages, sinks, window, frames, group, pairing, dtype",
    [
        ((1, 3, 6), 2, 3, 2, 2, "interleaved", torch.float32),
        ((7,), 1, 3, 2, 1, "half", torch.float16),
        ((3,), 3, 3, 3, 1, "interleaved", torch.float32),
        ((2,), 0, 2, 2, 4, "half", torch.float32),
    ],
    ids=["ages", "wrapped", "no_past", "no_sink"],
)
def test_chunk_attention(device, ages, sinks, window, frames, group, pairing, dtype):
    rope = rf.Rope3D(32, 2, 5, pairing=pairing)
    batch, tokens = len(ages), 10
    caches = [
        rf.EMASinkCache(
            num_layers=1, batch_size=batch, num_kv_heads=1, head_dim=32, frame_tokens=tokens, sink_frames=sinks,
            window_frames=window, alpha=0.5, rope=rope, dtype=wide or dtype, device=device,
        )
        for _, wide in RUNS
    ]  # fmt: skip
    for age in range(max(ages)):
        k, v = (torch.randn(batch, tokens, 1, 32, device=device) for _ in range(2))
        for cache in caches:
            with rf.use_backend("reference"):
                cache.begin_chunk(1, samples=[b for b in range(batch) if age < ages[b]])
                cache[0].write(k.to(cache.dtype), v.to(cache.dtype))
    for cache in caches:
        cache.begin_chunk(frames, samples=[])
    qkv = [uneven(batch, frames * tokens, h, 32, dtype=dtype, device=device) for h in (group, 1, 1)]
    compare(lambda index, q, k, v: rf.chunk_attention(q, k, v, caches[index][0].context(), return_lse=True), qkv, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_redmd_loss(device, dtype, masked, guided):
    shape = (2, 3, 4, 5, 111)
    x, fake, real, real_uncond, fake_uncond = (torch.randn(shape, device=device) for _ in range(5))
    fake[0, 0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    weight = torch.rand(2, device=device)
    mask = torch.rand(2, 3, 1, 1, 1, device=device) > 0.5 if masked else None
    results = []
    for backend, wide in RUNS:
        own = wide or dtype
        leaf = x.to(dtype).to(own).clone().requires_grad_()
        latents = [y.to(dtype).to(own) for y in (fake, real, real_uncond, fake_uncond)]
        with rf.use_backend(backend):
            loss = rf.losses.redmd.redmd_loss(
                leaf, *latents[:2], latents[2] if guided else None, weight, guidance_scale=2.0, mask=mask,
                fake_uncond=latents[3] if guided else None, fake_guidance_scale=1.5,
            )  # fmt: skip
        results.append([loss, torch.autograd.grad(3 * loss, leaf)[0]])
    for name, *triple in zip(("loss", "grad"), *results, strict=True):
        check(name, *triple, torch.float32 if name == "loss" else dtype)


def test_results_repeat_bit_for_bit(device):
    qkv = [uneven(1, 40, 1, 32, dtype=torch.float32, device=device).requires_grad_() for _ in range(3)]
    runs = []
    for _ in range(2):
        with rf.use_backend("triton"):
            out = rf.sink_window_attention(*qkv, sink_tokens=3, window_tokens=10)
        runs.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
