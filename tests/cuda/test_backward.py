"""The attention backward executed on the PTX emulator, all checkers on, against gradients of the reference backend."""

import budget
import pytest
import torch

from cuda.backward import backward
from cuda.test_forward import padded, tables
from rfkernels.backends import reference
from rfkernels.contract.geometry import CacheGeometry, WindowMask
from rfkernels.contract.requests import ChunkAttention, Past, WindowAttention, open_frames

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def gradients(function, inputs, grads):
    """out, lse and the gradients of ``inputs``, through both."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = function(*inputs)
    found = torch.autograd.grad((out, lse), inputs, [g.to(x.dtype) for g, x in zip(grads, (out, lse), strict=True)])
    return out.detach(), lse.detach(), found


def compare(got, exact, plain, dtype) -> None:
    for name, ours, wide, same in zip(("grad_q", "grad_k", "grad_v"), got, exact, plain, strict=True):
        budget.check(ours, wide, same, name, least=1e-3, dtype=dtype)


def conflicts(counts) -> int:
    return sum(row[6] for row in counts.instructions if row[0].startswith(("ldmatrix", "cp.async", "ld.shared.v2")))


def run_chunk(cuda_module, dtype, head_dim, *, ages=(2, 9), frames=3, size=(3, 5), heads=(4, 2), types=None, **options):
    """types: dtypes of q, k and v; the past has ``dtype``."""
    tokens, types = size[0] * size[1], types or (dtype,) * 3
    geometry = CacheGeometry(options.pop("sinks", 2), options.pop("window", 5), tokens)
    rope, scale = options.pop("rope", "interleaved"), options.pop("scale", head_dim**-0.5)
    batch, num_frames = len(ages), torch.tensor(ages)
    q, k, v = (
        padded(batch, frames * tokens, h, head_dim, dtype=t)
        for h, t in zip((heads[0], *heads[1:] * 2), types, strict=True)
    )
    count = geometry.capacity - frames
    past_k, past_v = (padded(batch, count * tokens, heads[1], head_dim, dtype=dtype) for _ in range(2))
    for sample, age in enumerate(ages):
        valid = max(geometry.valid_frames(age) - frames, 0) * tokens
        past_k[sample, valid:] = past_v[sample, valid:] = torch.nan
    ropes = [tables(head_dim, size, rope == "half", d) if rope else None for d in (dtype, torch.float64)]
    grads = (
        padded(batch, frames * tokens, heads[0], head_dim, dtype=dtype),
        torch.randn(batch, heads[0], 1).expand(-1, -1, frames * tokens),
    )

    def attend(precision, tables_of):
        past = Past(past_k.to(precision), past_v.to(precision), num_frames, False)
        return lambda *x: reference.chunk_attention(ChunkAttention(*x, past, tables_of, geometry, scale))

    out, lse, plain = gradients(attend(dtype, ropes[0]), (q, k, v), grads)
    _, _, exact = gradients(attend(torch.float64, ropes[1]), [x.double() for x in (q, k, v)], grads)

    numbers = open_frames(num_frames, frames)
    turned, own_k = (reference.rotate(x, numbers, ropes[0], dtype=dtype) for x in (q, k))
    present = (numbers >= 0).repeat_interleave(tokens, 1)[:, :, None, None]
    own_k, own_v = (torch.where(present, x, torch.nan) for x in (own_k, v.to(dtype)))  # must not be looked at
    got, counts = backward(
        cuda_module, grads[0], grads[1], out, lse, turned, None, past_k, past_v, own_k=own_k, own_v=own_v,
        num_frames=num_frames, rope=ropes[0], frame_tokens=tokens, capacity=geometry.capacity, scale=scale, types=types,
    )  # fmt: skip
    compare(got, exact, plain, dtype)
    assert [conflicts(c) for c in counts] == [0, 0]
    return got


def run_window(cuda_module, dtype, head_dim, queries, keys, mask, rope=None, heads=(2, 1), size=(2, 3)):
    q, k, v = (padded(1, n, h, head_dim, dtype=dtype) for n, h in ((queries, heads[0]), *((keys, heads[1]),) * 2))
    ropes = [tables(head_dim, size, rope == "half", d) if rope else None for d in (dtype, torch.float64)]
    grads = padded(1, queries, heads[0], head_dim, dtype=dtype), torch.randn(1, heads[0], queries)
    scale = head_dim**-0.5

    def attend(rope):
        return lambda *x: reference.sink_window_attention(WindowAttention(*x, mask, rope, scale))

    out, lse, plain = gradients(attend(ropes[0]), (q, k, v), grads)
    wide = [x.double() for x in (q, k, v)]
    _, _, exact = gradients(attend(ropes[1]), wide, grads)

    turned, sink_q, turned_k = q, q, k
    if rope:
        tokens, rows = size[0] * size[1], torch.arange(keys - queries, keys)
        frames, first = rows // tokens, (keys - queries) % tokens
        late = frames - mask.evicted_frames(rows, tokens)
        turned, sink_q = (
            reference.rotate(q, f[None], ropes[0], first_token=first, dtype=dtype) for f in (frames, late)
        )
        turned_k = reference.rotate(k, torch.arange(keys)[None] // tokens, ropes[0], dtype=dtype)
    got, counts = backward(
        cuda_module, *grads, out, lse, turned, sink_q, turned_k, v, rope=ropes[0], mask=mask, scale=scale,
        types=(dtype,) * 3,
    )  # fmt: skip
    compare(got, exact, plain, dtype)
    assert [conflicts(c) for c in counts] == [0, 0]
    return counts


@pytest.mark.parametrize(
    "dtype, head_dim",
    [(t, d) for d in (64, 80, 128) for t in (BF16, FP16)]
    + [(BF16, 96), *(pytest.param(t, d, marks=pytest.mark.slow) for t, d in ((FP16, 96), (BF16, 256), (FP16, 256)))],
)
def test_chunk(cuda_module, dtype, head_dim):
    """A stream with a missing frame, and one whose window has moved on; grouped heads."""
    run_chunk(cuda_module, dtype, head_dim)


@pytest.mark.parametrize(
    "options",
    [
        {"rope": "half", "types": (FP32, BF16, FP16), "heads": (1, 1), "ages": (7,), "size": (5, 9)},
        {"rope": None, "ages": (0, 5), "scale": -0.3},
        {"ages": (3,), "sinks": 0, "window": 3, "scale": 0.0},
    ],
    ids=["half_mixed", "empty_stream", "no_past"],
)
def test_chunk_forms(cuda_module, options):
    run_chunk(cuda_module, BF16, 64, **options)


# queries, keys, (sink, window, chunk, first chunk, own chunk), rope's pairing, heads
WINDOWS = {
    "causal": (150, 150, (5, 40, 1, 1, True), None, (1, 1)),
    "fewer_queries": (70, 190, (40, 30, 1, 1, True), None, (3, 1)),
    "rope": (160, 160, (12, 36, 12, 12, True), "interleaved", (2, 1)),
    "half": (130, 172, (12, 24, 12, 6, True), "half", (1, 1)),
    "past_only": (140, 140, (6, 36, 12, 6, False), "interleaved", (1, 1)),
    "dense": (66, 66, (0, 100, 100, 100, True), None, (1, 1)),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_window(cuda_module, case):
    queries, keys, mask, rope, heads = WINDOWS[case]
    run_window(cuda_module, BF16, 64, queries, keys, WindowMask(*mask), rope, heads)


@pytest.mark.parametrize(
    "dtype, head_dim",
    [(FP16, 64), (BF16, 80), (FP16, 80), (BF16, 96), (BF16, 128), (FP16, 128)]
    + [pytest.param(t, d, marks=pytest.mark.slow) for t, d in ((FP16, 96), (BF16, 256), (FP16, 256))],
)
def test_window_by_every_kernel(cuda_module, dtype, head_dim):
    queries, keys, mask, _, heads = WINDOWS["half"]
    run_window(cuda_module, dtype, head_dim, queries, keys, WindowMask(*mask), "interleaved", heads)


def test_equal_bits_in_any_order_of_blocks_and_warps(cuda_module):
    q, k, v, grad_out = (padded(1, 150, heads, 64, dtype=BF16) for heads in (2, 1, 1, 2))
    out, lse, grad_lse = torch.randn(1, 150, 2, 64).to(BF16), torch.randn(1, 2, 150) + 5, torch.randn(1, 2, 150)
    first, second = (
        backward(
            cuda_module, grad_out, grad_lse, out, lse, q, q, k, v, types=(FP32,) * 3, scale=0.1, seed=seed,
            mask=WindowMask(5, 40, 1, 1, True),
        )[0]
        for seed in (1, 2)
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
