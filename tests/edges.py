"""Lengths at the edges of tiles, for every backend: a key too few or too many is seen in the normaliser.

Scores change by a third from key to key, so the first or the last key weighs as much as all that follow or precede it,
and the normaliser is held to float32's own error against float64 on the inputs as they were rounded. No rope: with one
queries and keys are rounded once more after they are turned.
"""

from __future__ import annotations

import itertools

import budget
import oracle
import pytest
import torch

import rfkernels as rf

HEAD_DIM, SLOPE = 64, 1 / 3
AROUND = (-1, 0, 1)

# Queries, keys, sinks, window, tokens of a chunk; all at offsets from multiples of 64 and 128.
WINDOWS = [
    *((128 + rows, 256 + keys, 0, None, 1024) for rows, keys in itertools.product(AROUND, AROUND)),  # all see all
    *((64, 768 + keys, 0, None, 1024) for keys in AROUND),  # shared keys
    *(
        (192 + keys, 256 + keys, 64 + sinks, 64, 1) for keys, sinks in itertools.product(AROUND, (-1, 1))
    ),  # two segments
    *((128, 256, 64 + sinks, 64 - sinks, 32) for sinks in AROUND),
]
# From the first key of the first row to that of the last: 64 and 128, and their neighbours. Only scores that fall show
# what comes before the first key, and no sink may outweigh it.
FIRST_KEYS = [
    *((65 + rows, 300, 0, 150, 1) for rows in AROUND),
    *((128, 600, 0, 300, 128 + tokens) for tokens in AROUND),
]
# Tokens of a frame and frames before the open one.
STREAMS = [*((128 + tokens, 1) for tokens in AROUND), *((64 + tokens, 2) for tokens in AROUND), (65, 11), (63, 11)]


# Queries, keys, window. In a tile of 128 rows or keys, or of 32, the last begins and the first ends beside a multiple
# of 32, which is what the backward kernels sweep at a time.
GRADIENTS = {128: (146, 240, 189), 32: (64, 94, 93)}
BOTH = pytest.mark.parametrize("slope", [SLOPE, -SLOPE], ids=["rising", "falling"])


def in_turns(cases: list) -> list:
    """Each case with rising and with falling scores, of which every second one is slow."""
    both = itertools.product(enumerate(cases), enumerate((("rising", SLOPE), ("falling", -SLOPE))))
    return [
        pytest.param(case, slope, id=f"{name}-{case}".replace(" ", ""), marks=[pytest.mark.slow] * ((i + j) % 2))
        for (i, case), (j, (name, slope)) in both
    ]


def falling(cases: list) -> list:
    return [pytest.param(case, -SLOPE, id=f"falling-{case}".replace(" ", "")) for case in cases]


def rising(queries: int, keys: int, slope: float, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    """q, k, v of one head, with scores that change by about ``slope`` from key to key."""
    q = 1 + 0.1 * torch.randn(1, queries, 1, HEAD_DIM)
    k = 0.3 * torch.randn(1, keys, 1, HEAD_DIM) + (slope * HEAD_DIM**-0.5 * torch.arange(keys))[None, :, None, None]
    return [x.to(device, dtype) for x in (q, k, torch.randn(1, keys, 1, HEAD_DIM))]


def compare(what: str, got, narrow, single, exact, dtype: torch.dtype) -> None:
    """Pairs of output and normaliser: the backend's, the reference's in its dtype, in float32 and in float64."""
    oracle.check("out", got[0], narrow[0], exact[0], dtype)
    budget.check(got[1], exact[1], single[1], f"{what}: normaliser", least=1.0, dtype=torch.float32)


def run_window(backend: str, device: torch.device, dtype: torch.dtype, case: tuple, slope: float) -> None:
    queries, keys, sinks, window, chunk = case
    qkv, results = rising(queries, keys, slope, dtype, device), []
    for name, run_dtype in ((backend, dtype), *(("reference", d) for d in (dtype, torch.float32, torch.float64))):
        with rf.use_backend(name):
            results.append(
                rf.sink_window_attention(
                    *(x.to(run_dtype) for x in qkv), sink_tokens=sinks, window_tokens=window, chunk_tokens=chunk,
                    return_lse=True,
                )
            )  # fmt: skip
    compare(str(case), *results, dtype)


def run_gradients(
    backend: str, device: torch.device, dtype: torch.dtype, case: tuple[int, int, int], slope: float
) -> None:
    """A tile that is taken for one that every row sees has a key or a row too many, which outweighs its neighbours."""
    queries, keys, window = case
    oracle.compare(
        backend,
        lambda _, *qkv: rf.sink_window_attention(*qkv, sink_tokens=0, window_tokens=window, return_lse=True),
        rising(queries, keys, slope, dtype, device), dtype,
    )  # fmt: skip


def run_constant(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Values of 1 give 1: weights are rounded to the nearest, for truncated ones sum to a unit less."""
    q, k = (torch.randn(1, tokens, 1, HEAD_DIM, device=device).to(dtype) for tokens in (128, 512))
    with rf.use_backend(backend):
        out = rf.sink_window_attention(q, k, torch.ones_like(k), sink_tokens=0, window_tokens=None, chunk_tokens=512)
    assert torch.equal(out, torch.ones_like(out))


def run_unbiased(backend: str, device: torch.device, dtype: torch.dtype, keys: int = 768) -> None:
    """Output and gradients, of few queries and many keys, which blocks share: nothing is truncated, no sum is rounded
    on the way."""
    qkv = [torch.randn(1, tokens, 1, HEAD_DIM, device=device).to(dtype) for tokens in (64, keys, keys)]
    incoming, results = torch.randn(1, 64, 1, HEAD_DIM, device=device).to(dtype), []
    for name, run_dtype in ((backend, dtype), ("reference", torch.float64)):
        inputs = [x.to(run_dtype).requires_grad_() for x in qkv]
        with rf.use_backend(name):
            out = rf.sink_window_attention(*inputs, sink_tokens=0, window_tokens=None, chunk_tokens=1024)
        results.append((out, *torch.autograd.grad(out, inputs, incoming.to(run_dtype))))
    for what, got, exact in zip(("out", "grad_q", "grad_k", "grad_v"), *results, strict=True):
        budget.check_unbiased(got, exact, what, dtype)
        budget.check_sums_are_wide(got, exact, what, dtype)


def run_stream(
    backend: str, device: torch.device, dtype: torch.dtype, case: tuple[int, int], slope: float, chunk: bool
) -> None:
    """The open frame after others: a pass, which sees the cache, or with ``chunk`` past and own keys apart."""
    tokens, past = case
    q, k, v = rising(tokens, (past + 1) * tokens, slope, dtype, device)
    results = []
    for name, run_dtype in ((backend, dtype), *(("reference", d) for d in (dtype, torch.float32, torch.float64))):
        cache = rf.EMASinkCache(
            num_layers=1, batch_size=1, num_kv_heads=1, head_dim=HEAD_DIM, frame_tokens=tokens, sink_frames=1,
            window_frames=past + 1, rope=None, dtype=run_dtype, device=device,
        )  # fmt: skip
        frames = [
            (a.to(run_dtype), b.to(run_dtype)) for a, b in zip(k.split(tokens, 1), v.split(tokens, 1), strict=True)
        ]
        with rf.use_backend(name):
            for frame in frames[:-1]:
                cache.begin_chunk(1)
                cache[0].write(*frame)
            cache.begin_chunk(1)
            if chunk:
                given = rf.chunk_attention(q.to(run_dtype), *frames[-1], cache[0].context(), return_lse=True)
            else:
                given = rf.streaming_attention(q.to(run_dtype), *frames[-1], cache[0], return_lse=True)
            results.append(given)
    compare(str(case), *results, dtype)
