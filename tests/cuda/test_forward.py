"""The attention forward executed on the PTX emulator, all checkers on, against reference.py."""

import budget
import pytest
import torch
from cuda.launch import forward

import rfkernels as rf
from rfkernels import reference
from rfkernels.arguments import Past
from rfkernels.geometry import CacheGeometry, WindowMask

BF16, FP16 = torch.bfloat16, torch.float16


def padded(*size: int, dtype: torch.dtype) -> torch.Tensor:
    """Random values in a view with NaN around each row."""
    *front, heads, last = size
    full = torch.full((*front, heads + 1, last + 8), float("nan"), dtype=dtype)
    full[..., :heads, :last] = torch.randn(size)
    return full[..., :heads, :last]


def compare(name: str, got, exact, plain, dtype) -> None:
    for what, ours, wide, same in zip(("out", "lse"), got, exact, plain, strict=True):
        budget.check(ours, wide, same, f"{name} {what}", least=1e-3 if what == "out" else 1.0, dtype=dtype)


def tables(head_dim: int, tokens: tuple[int, int], half: bool, dtype: torch.dtype):
    rope = rf.Rope3D(head_dim, *tokens, pairing="half" if half else "interleaved")
    return rope.tables("cpu", dtype)


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
    plain = reference.attend(q, k, v, num_frames, rope_tables[0], geometry, scale)
    exact = reference.attend(q.double(), k.double(), v.double(), num_frames, rope_tables[1], geometry, scale)
    compare("prefix", (out, lse), exact, plain, dtype)
    return counts


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_prefix(cuda_module, dtype, head_dim):
    """A stream with a missing frame, and one whose cache is full; grouped heads."""
    assert run_prefix(cuda_module, dtype, head_dim).bank_conflicts == 0


@pytest.mark.parametrize(
    "options",
    [
        {"rope": None, "ages": (0, 5)},
        {"rope": "half", "ages": (3,), "heads": (1, 1), "keys": 32},
        {"splits": 3, "ages": (9,), "q_dtype": torch.float32},
        {"scale": -0.3, "ages": (4,)},
        {"scale": 0.0, "ages": (4,)},
    ],
    ids=["empty", "half", "splits", "negative", "zero"],
)
def test_prefix_forms(cuda_module, options):
    run_prefix(cuda_module, BF16, 128, **options)
