"""Re-DMD in two passes over memory: the normaliser, then loss and gradient; sums in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import FUSION, on_device

_BLOCK = 4096  # elements a program handles at a time
_PROGRAMS = 256  # of one sample at most: each program of the second pass adds up their sums


@triton.jit
def _guided(COND, UNCOND, at, known, scale, HAS_UNCOND: tl.constexpr):
    cond = tl.load(COND + at, mask=known, other=0.0).to(tl.float32)
    if HAS_UNCOND:
        cond += scale * (cond - tl.load(UNCOND + at, mask=known, other=0.0).to(tl.float32))
    return cond


@triton.jit
def _joined(total):
    """The sum of ``total [BLOCK]``, of a thread's elements in float32 and from there on in float64.

    What is summed for each thread has rounding errors of its own; the joint ones would all go into one scalar, and the
    normaliser's error counts twice in the loss.
    """
    return tl.sum(tl.sum(tl.reshape(total, (total.shape[0] // 8, 8)), 1).to(tl.float64), 0)


@triton.jit
def norm_kernel(
    X, REAL, REAL_UNCOND, MASK, NORMS, COUNTS, guidance, elements, span,
    HAS_REAL_UNCOND: tl.constexpr, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums of ``|x - real|`` and of the mask over ``span`` elements of one sample: ``NORMS, COUNTS [B, programs]``."""
    sample, part = tl.program_id(1), tl.program_id(0)
    start = tl.cast(part, tl.int64) * span
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for step in range(0, span, BLOCK):
        within = start + step + tl.arange(0, BLOCK)
        known = within < elements
        at = tl.cast(sample, tl.int64) * elements + within
        real = _guided(REAL, REAL_UNCOND, at, known, guidance, HAS_REAL_UNCOND)
        x = tl.load(X + at, mask=known, other=0.0).to(tl.float32)
        total += tl.abs(x - real)
        if HAS_MASK:
            count += (tl.load(MASK + at, mask=known, other=0) != 0).to(tl.int32)
    place = sample * tl.num_programs(0) + part
    tl.store(NORMS + place, _joined(total))
    tl.store(COUNTS + place, tl.sum(count, 0))


@triton.jit
def _selected(COUNTS, parts, elements, HAS_MASK: tl.constexpr, PARTS: tl.constexpr):
    """max(1, number of elements in the mask), in float64."""
    if HAS_MASK:
        count = tl.zeros([PARTS], tl.int64)
        for start in range(0, parts, PARTS):
            at = start + tl.arange(0, PARTS)
            count += tl.load(COUNTS + at, mask=at < parts, other=0).to(tl.int64)
        return tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    return tl.cast(tl.maximum(elements, 1), tl.float64)


@triton.jit
def grad_kernel(
    X, FAKE, REAL, REAL_UNCOND, FAKE_UNCOND, MASK, WEIGHT, NORMS, COUNTS, GRAD, SUMS, guidance, fake_guidance, elements,
    all_elements, span, batch,
    HAS_REAL_UNCOND: tl.constexpr, HAS_FAKE_UNCOND: tl.constexpr, HAS_MASK: tl.constexpr, NEED_GRAD: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """``GRAD`` and, into ``SUMS [B, programs]``, this program's share of the sum of squares times the weight."""
    sample, part, parts = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    place = tl.arange(0, PARTS)
    norms = tl.load(NORMS + sample * parts + place, mask=place < parts, other=0.0)
    norm = (tl.sum(norms, 0) / elements).to(tl.float32)
    count = _selected(COUNTS, parts * batch, all_elements, HAS_MASK, PARTS)
    share = tl.load(WEIGHT + sample).to(tl.float64) / count
    weight = share.to(tl.float32)
    start = tl.cast(part, tl.int64) * span
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, span, BLOCK):
        within = start + step + tl.arange(0, BLOCK)
        known = within < elements
        at = tl.cast(sample, tl.int64) * elements + within
        real = _guided(REAL, REAL_UNCOND, at, known, guidance, HAS_REAL_UNCOND)
        fake = _guided(FAKE, FAKE_UNCOND, at, known, fake_guidance, HAS_FAKE_UNCOND)
        grad = (fake - real) / norm
        grad = tl.where(tl.abs(grad) < float("inf"), grad, 0.0)  # NaN compares false
        if HAS_MASK:
            grad = tl.where(tl.load(MASK + at, mask=known, other=0) != 0, grad, 0.0)
        total += tl.where(known, grad * grad, 0.0)
        if NEED_GRAD:
            tl.store(GRAD + at, (weight * grad).to(GRAD.dtype.element_ty), mask=known)
    tl.store(SUMS + sample * parts + part, share * _joined(total))


@triton.jit
def sum_kernel(SUMS, LOSS, count, BLOCK: tl.constexpr):
    """LOSS = half the sum of ``count`` shares, in one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(SUMS + at, mask=at < count, other=0.0)
    tl.store(LOSS, (0.5 * tl.sum(total, 0)).to(tl.float32))


def redmd_loss(
    x: torch.Tensor,
    fake: torch.Tensor,
    real_cond: torch.Tensor,
    real_uncond: torch.Tensor | None,
    fake_uncond: torch.Tensor | None,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    guidance_scale: float,
    fake_guidance_scale: float,
    need_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.redmd_loss`. Latents and mask that are not contiguous are copied first."""
    x, fake, real_cond, real_uncond, fake_uncond, mask = (
        None if t is None else t.contiguous() for t in (x, fake, real_cond, real_uncond, fake_uncond, mask)
    )
    batch, elements = x.shape[0], x[:1].numel()
    parts = max(1, min(_PROGRAMS, triton.cdiv(elements, _BLOCK)))
    span = triton.cdiv(triton.cdiv(elements, parts), _BLOCK) * _BLOCK
    parts = max(1, triton.cdiv(elements, span) if span else 1)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=x.device)

    norms, counts, sums, loss = (
        empty(batch, parts, dtype=torch.float64),
        empty(batch, parts, dtype=torch.int32),
        empty(batch, parts, dtype=torch.float64),
        empty(),
    )
    grad = torch.empty_like(x) if need_grad else x.new_empty(0)
    if x.numel() == 0:
        return loss.zero_(), grad
    flags = {"HAS_REAL_UNCOND": real_uncond is not None, "HAS_MASK": mask is not None}
    real_uncond = real_cond if real_uncond is None else real_uncond
    selected = x if mask is None else mask
    with on_device(x):
        norm_kernel[(parts, batch)](
            x, real_cond, real_uncond, selected, norms, counts, guidance_scale, elements, span, **flags, BLOCK=_BLOCK,
            num_warps=8, **FUSION,
        )  # fmt: skip
        grad_kernel[(parts, batch)](
            x, fake, real_cond, real_uncond, fake if fake_uncond is None else fake_uncond, selected,
            weight.contiguous(), norms, counts, grad, sums, guidance_scale, fake_guidance_scale, elements, x.numel(),
            span, batch, **flags, HAS_FAKE_UNCOND=fake_uncond is not None, NEED_GRAD=need_grad, BLOCK=_BLOCK,
            PARTS=triton.next_power_of_2(parts), num_warps=8, **FUSION,
        )  # fmt: skip
        sum_kernel[(1,)](sums, loss, sums.numel(), BLOCK=1024, num_warps=4, **FUSION)
    return loss, grad
