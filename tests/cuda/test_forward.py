"""The attention forward executed on the PTX emulator, all checkers on, against the reference backend."""

import itertools

import budget
import pytest
import torch

import rfkernels as rf
from cuda.launch import SHORT, forward
from rfkernels.backends import reference
from rfkernels.contract.geometry import CacheGeometry, WindowMask
from rfkernels.contract.requests import ChunkAttention, Past, WindowAttention, accumulate_dtype, open_frames

BF16, FP16 = torch.bfloat16, torch.float16
each_kernel = pytest.mark.parametrize("hopper", [False, True], ids=["sm_80", "sm_90a"])


def padded(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values in a view with NaN around each row."""
    *front, heads, last = size
    full = torch.full((*front, heads + 1, last + 8), float("nan"), dtype=dtype)
    full[..., :heads, :last] = torch.randn(size)
    return full[..., :heads, :last]


def compare(name: str, got, exact, plain, dtype) -> None:
    for what, ours, wide, same in zip(("out", "lse"), got, exact, plain, strict=True):
        budget.check(ours, wide, same, f"{name} {what}", least=1e-3 if what == "out" else 1.0, dtype=dtype)


def conflicts(counts, *opcodes: str) -> int:
    return sum(row[6] for row in counts.instructions if row[0].startswith(opcodes))


def tables(head_dim: int, tokens: tuple[int, int], half: bool, dtype: torch.dtype):
    rope = rf.Rope3D(head_dim, *tokens, pairing="half" if half else "interleaved")
    return rope.tables("cpu", dtype)


def attend_prefix(q, k, v, num_frames, rope, geometry, scale):
    """A streaming pass of `reference`, but for what it writes."""
    frames = open_frames(num_frames, q.shape[1] // geometry.frame_tokens)
    q = reference.rotate(q, frames, rope, dtype=accumulate_dtype(k.dtype))
    seen = torch.arange(k.shape[1]) < geometry.valid_frames(num_frames)[:, None] * geometry.frame_tokens
    present = (frames >= 0).repeat_interleave(geometry.frame_tokens, 1)
    out, lse = reference.dense_attention(q, k, v, present[:, :, None] & seen[:, None], scale)
    return out.to(k.dtype), lse


def run_prefix(cuda_module, dtype, head_dim, *, frames=3, size=(5, 9), ages=(2, 40), heads=(4, 2), **options):
    tokens, geometry = size[0] * size[1], CacheGeometry(2, 5, size[0] * size[1])
    num_frames = torch.tensor(ages)
    rope = options.pop("rope", "interleaved")
    q_dtype, scale = options.pop("q_dtype", dtype), options.pop("scale", head_dim**-0.5)
    q = padded(len(ages), frames * tokens, heads[0], head_dim, dtype=q_dtype)
    k, v = (padded(len(ages), geometry.capacity * tokens, heads[1], head_dim, dtype=dtype) for _ in range(2))
    for sample, age in enumerate(ages):
        k[sample, geometry.valid_frames(age) * tokens :] = v[sample, geometry.valid_frames(age) * tokens :] = torch.nan
    rope_tables = [tables(head_dim, size, rope == "half", d) if rope else None for d in (dtype, torch.float64)]
    out, lse, counts = forward(
        cuda_module, q, k, v, num_frames=num_frames, rope=rope_tables[0], frame_tokens=tokens,
        capacity=geometry.capacity, scale=scale, **options,
    )  # fmt: skip
    plain = attend_prefix(q, k, v, num_frames, rope_tables[0], geometry, scale)
    exact = attend_prefix(q.double(), k.double(), v.double(), num_frames, rope_tables[1], geometry, scale)
    compare("prefix", (out, lse), exact, plain, dtype)
    return counts


def prefixes():
    for hopper, head_dim, dtype in itertools.product((False, True), (64, 80, 96, 128, 256), (BF16, FP16)):
        marks = pytest.mark.slow if hopper and dtype is FP16 and head_dim not in (64, 128) else ()
        name = f"{SHORT[dtype]}-{head_dim}-{'sm_90a' if hopper else 'sm_80'}"
        yield pytest.param(dtype, head_dim, hopper, marks=marks, id=name)


@pytest.mark.parametrize("dtype, head_dim, hopper", list(prefixes()))
def test_prefix(cuda_module, dtype, head_dim, hopper):
    """A stream with a missing frame, and one whose cache is full; grouped heads."""
    counts = run_prefix(cuda_module, dtype, head_dim, hopper=hopper)
    assert conflicts(counts, "ldmatrix", "cp.async") == 0  # the main loop's; filling and emptying q's tile has some


def run_chunk(cuda_module, dtype, head_dim, *, rope=True, ages=(7, 2), **options):
    size, frames = (3, 11), 3
    tokens, geometry = size[0] * size[1], CacheGeometry(2, 5, size[0] * size[1])
    q = padded(2, frames * tokens, 4, head_dim, dtype=dtype)
    own_k, own_v = (padded(2, frames * tokens, 2, head_dim, dtype=dtype) for _ in range(2))
    past_k, past_v = (padded(2, (geometry.capacity - frames) * tokens, 2, head_dim, dtype=dtype) for _ in range(2))
    num_frames = torch.tensor(ages)
    for sample, age in enumerate(ages):
        valid = max(geometry.valid_frames(age) - frames, 0) * tokens
        past_k[sample, valid:] = past_v[sample, valid:] = torch.nan
        missing = max(frames - age, 0) * tokens
        own_k[sample, :missing] = own_v[sample, :missing] = torch.nan
    rope_tables = [tables(head_dim, size, False, d) if rope else None for d in (dtype, torch.float64)]
    rotated = reference.rotate(own_k, open_frames(num_frames, frames), rope_tables[0])
    results = [
        forward(cuda_module, q, past_k, past_v, own_k=rotated, own_v=own_v, num_frames=num_frames, rope=rope_tables[0],
                frame_tokens=tokens, capacity=geometry.capacity, scale=0.1, **options)[:2]
    ]  # fmt: skip
    for d, table in ((torch.float64, rope_tables[1]), (dtype, rope_tables[0])):
        past = Past(past_k.to(d), past_v.to(d), num_frames, False)
        request = ChunkAttention(*(x.to(d) for x in (q, own_k, own_v)), past, table, geometry, 0.1)
        results.append(reference.chunk_attention(request))
    compare("chunk", *results, dtype)


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no rope"])
@pytest.mark.parametrize("ages", [(7, 2), (12, 3)], ids=str)
@pytest.mark.parametrize("shares", [1, 2])
@each_kernel
def test_chunk(cuda_module, rope, ages, shares, hopper):
    """Past and open chunk, in streams of different ages; the second has a missing frame or no past."""
    run_chunk(cuda_module, BF16, 64, rope=rope, ages=ages, shares=shares, hopper=hopper)


# The other kernels: dtype, head_dim, keys of a tile where there is a choice.
KERNELS = [(FP16, 64, 0), (BF16, 80, 0), (FP16, 80, 0), (BF16, 96, 0), (BF16, 128, 0), (FP16, 128, 0), (BF16, 128, 32),
           (BF16, 256, 0)]  # fmt: skip
IDS = {BF16: "bf16", FP16: "fp16"}.get


@pytest.mark.parametrize("dtype, head_dim, keys", KERNELS, ids=IDS)
def test_chunk_by_every_kernel(cuda_module, dtype, head_dim, keys):
    run_chunk(cuda_module, dtype, head_dim, keys=keys)


MASKS = {
    "token-causal": (WindowMask(3, 70, 1, 1, True), None),
    "chunks": (WindowMask(24, 72, 36, 36, True), (3, 4)),
    "first chunk": (WindowMask(12, 48, 36, 12, True), (3, 4)),
    "clean context": (WindowMask(24, 72, 36, 36, False), (3, 4)),
    "no sinks": (WindowMask(0, 36, 12, 12, True), (3, 4)),
    "everything": (WindowMask(0, 2**40, 2**40, 2**40, True), None),
    "token-causal, rope": (WindowMask(2, 50, 1, 1, True), (1, 1)),
}


def run_window(cuda_module, dtype, head_dim, mask, size, queries=None, **options):
    keys = 252
    q = padded(1, queries or keys, 2, head_dim, dtype=dtype)
    k, v = (padded(1, keys, 1, head_dim, dtype=dtype) for _ in range(2))
    rope_tables = [tables(head_dim, size, False, d) if size else None for d in (dtype, torch.float64)]
    rotated = k
    if size:
        frames = torch.arange(keys)[None] // rope_tables[0].frame_tokens
        rotated = reference.rotate(k, frames, rope_tables[0])
    got = forward(cuda_module, q, rotated, v, mask=mask, rope=rope_tables[0], scale=0.2, **options)[:2]
    plain = reference.sink_window_attention(WindowAttention(q, k, v, mask, rope_tables[0], 0.2))
    wide = (x.double() for x in (q, k, v))
    exact = reference.sink_window_attention(WindowAttention(*wide, mask, rope_tables[1], 0.2))
    compare("window", got, exact, plain, dtype)


# Tiles of queries with a block each, and blocks that share the keys of every further one.
TAILS = {"all": (0, 2), "most": (1, 3), "the last": (3, 2)}


@each_kernel
@pytest.mark.parametrize("whole, shares", TAILS.values(), ids=TAILS)
@pytest.mark.parametrize("use", ["prefix", "chunk", "window"])
def test_keys_of_a_tail_are_shared(cuda_module, use, whole, shares, hopper):
    """Each launch writes its rows and no others (`launch.forward` counts them)."""
    options = {"whole": whole, "shares": shares, "hopper": hopper}
    if use == "prefix":
        run_prefix(cuda_module, BF16, 64, ages=(9,), heads=(2, 1), **options)
    elif use == "chunk":
        run_chunk(cuda_module, BF16, 64, **options)
    else:
        run_window(cuda_module, BF16, 64, *MASKS["chunks"], **options)


@each_kernel
@pytest.mark.parametrize("shares", [1, 2])
def test_nan_is_not_hidden(cuda_module, shares, hopper):
    """A key that is NaN makes every row that sees it NaN, its normaliser too, whichever part of the keys it is in."""
    q, k, v = (torch.randn(1, n, 1, 64).bfloat16() for n in (128, 512, 512))
    k[0, 300] = float("nan")
    out, lse, _ = forward(
        cuda_module, q, k, v, num_frames=torch.tensor([4]), frame_tokens=128, capacity=4, scale=0.1, shares=shares,
        hopper=hopper,
    )  # fmt: skip
    assert out.isnan().all() and lse.isnan().all()


FORMS = {
    "empty": {"rope": None, "ages": (0, 5)},
    "half": {"rope": "half", "ages": (3,), "heads": (1, 1)},
    "shares": {"shares": 3, "ages": (9,), "q_dtype": torch.float32},
    "negative": {"scale": -0.3, "ages": (4,)},
    "zero": {"scale": 0.0, "ages": (4,)},
}


@each_kernel
@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
def test_prefix_forms(cuda_module, options, hopper):
    run_prefix(cuda_module, BF16, 128, hopper=hopper, **options)


def test_sixteen_shares(cuda_module):
    """As many as there may be, each of one tile."""
    run_prefix(cuda_module, BF16, 64, frames=1, size=(12, 12), ages=(40,), heads=(1, 1), shares=16)


def test_tiles_of_32_keys(cuda_module):
    """The kernel of multiprocessors with 100 KB of shared memory."""
    run_prefix(cuda_module, BF16, 128, ages=(3,), heads=(1, 1), keys=32)
