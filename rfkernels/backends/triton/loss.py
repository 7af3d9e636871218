"""Re-DMD (docs/semantics.md) in two passes over memory: the normaliser, then loss and gradient. Sums keep an order."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...contract.requests import ReDMD
from ..plan import divide_up
from .launch import FUSION, on_device

_BLOCK = 4096  # elements a program handles at a time
_PROGRAMS = 256  # of one sample at most: each program of the second pass adds up their sums


class Guided(NamedTuple):
    """A score with classifier-free guidance: ``cond + scale * (cond - uncond)``, or cond where uncond is None."""

    cond: Any
    uncond: Any
    scale: Any


@triton.jit
def _load_guided(score, at, exist):
    cond = tl.load(score.cond + at, mask=exist, other=0.0).to(tl.float32)
    if score.uncond is not None:
        cond += score.scale * (cond - tl.load(score.uncond + at, mask=exist, other=0.0).to(tl.float32))
    return cond


@triton.jit
def _joined(total):
    """The sum of ``total [BLOCK]``, of a thread's elements in float32 and from there on in float64.

    What is summed for each thread has rounding errors of its own; the joint ones would all go into one scalar, and the
    normaliser's error counts twice in the loss.
    """
    return tl.sum(tl.sum(tl.reshape(total, (total.shape[0] // 8, 8)), 1).to(tl.float64), 0)


@triton.jit
def norm_kernel(x, real, mask, NORMS, COUNTS, elements, span, BLOCK: tl.constexpr):
    """Sums of ``|x - real|`` and of the mask over ``span`` elements of one sample: ``NORMS, COUNTS [B, programs]``."""
    sample, program = tl.program_id(1), tl.program_id(0)
    start = tl.cast(program, tl.int64) * span
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for step in range(0, span, BLOCK):
        within = start + step + tl.arange(0, BLOCK)
        exist = within < elements
        at = tl.cast(sample, tl.int64) * elements + within
        total += tl.abs(tl.load(x + at, mask=exist, other=0.0).to(tl.float32) - _load_guided(real, at, exist))
        if mask is not None:
            count += (tl.load(mask + at, mask=exist, other=0) != 0).to(tl.int32)
    place = sample * tl.num_programs(0) + program
    tl.store(NORMS + place, _joined(total))
    tl.store(COUNTS + place, tl.sum(count, 0))


@triton.jit
def _selected(mask, COUNTS, programs, elements, BLOCK: tl.constexpr):
    """max(1, number of elements in the mask), in float64."""
    if mask is not None:
        count = tl.zeros([BLOCK], tl.int64)
        for start in range(0, programs, BLOCK):
            at = start + tl.arange(0, BLOCK)
            count += tl.load(COUNTS + at, mask=at < programs, other=0).to(tl.int64)
        return tl.maximum(tl.sum(count, 0), 1).to(tl.float64)
    else:
        return tl.cast(tl.maximum(elements, 1), tl.float64)


@triton.jit
def grad_kernel(
    x, fake, real, mask, WEIGHT, NORMS, COUNTS, GRAD, SUMS, elements, all_elements, span, batch,
    NEED_GRAD: tl.constexpr, BLOCK: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """``GRAD`` and, into ``SUMS [B, programs]``, this program's share of the sum of squares times the weight."""
    sample, program, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    place = tl.arange(0, SUMMED)
    norms = tl.load(NORMS + sample * programs + place, mask=place < programs, other=0.0)
    norm = (tl.sum(norms, 0) / elements).to(tl.float32)
    count = _selected(mask, COUNTS, programs * batch, all_elements, SUMMED)
    share = tl.load(WEIGHT + sample).to(tl.float64) / count
    weight = share.to(tl.float32)
    start = tl.cast(program, tl.int64) * span
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(0, span, BLOCK):
        within = start + step + tl.arange(0, BLOCK)
        exist = within < elements
        at = tl.cast(sample, tl.int64) * elements + within
        target = _load_guided(real, at, exist)
        grad = (_load_guided(fake, at, exist) - target) / norm
        grad = tl.where(tl.abs(grad) < float("inf"), grad, 0.0)  # NaN compares false
        if mask is not None:
            grad = tl.where(tl.load(mask + at, mask=exist, other=0) != 0, grad, 0.0)
        total += tl.where(exist, grad * grad, 0.0)
        if NEED_GRAD:
            tl.store(GRAD + at, (weight * grad).to(GRAD.dtype.element_ty), mask=exist)
    tl.store(SUMS + sample * programs + program, share * _joined(total))


@triton.jit
def sum_kernel(SUMS, LOSS, count, BLOCK: tl.constexpr):
    """LOSS = half the sum of ``count`` shares, in one program."""
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(SUMS + at, mask=at < count, other=0.0)
    tl.store(LOSS, (0.5 * tl.sum(total, 0)).to(tl.float32))


def redmd_loss(request: ReDMD) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and mask that are not contiguous are copied first."""
    x, fake, real_cond = request.x.contiguous(), request.fake.contiguous(), request.real_cond.contiguous()
    real_uncond, fake_uncond, mask = (
        None if t is None else t.contiguous() for t in (request.real_uncond, request.fake_uncond, request.mask)
    )
    batch, elements = x.shape[0], x[:1].numel()
    programs = max(1, min(_PROGRAMS, divide_up(elements, _BLOCK)))
    span = divide_up(divide_up(elements, programs), _BLOCK) * _BLOCK
    programs = max(1, divide_up(elements, span) if span else 1)

    def empty(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=x.device)

    norms, counts, sums, loss = (
        empty(batch, programs, dtype=torch.float64),
        empty(batch, programs, dtype=torch.int32),
        empty(batch, programs, dtype=torch.float64),
        empty(),
    )
    grad = torch.empty_like(x) if request.need_grad else x.new_empty(0)
    if x.numel() == 0:
        return loss.zero_(), grad
    real = Guided(real_cond, real_uncond, request.guidance_scale)
    guided_fake = Guided(fake, fake_uncond, request.fake_guidance_scale)
    with on_device(x):
        norm_kernel[(programs, batch)](
            x, real, mask, norms, counts, elements, span, BLOCK=_BLOCK, num_warps=8, **FUSION
        )
        grad_kernel[(programs, batch)](
            x, guided_fake, real, mask, request.weight.contiguous(), norms, counts, grad, sums, elements, x.numel(),
            span, batch, NEED_GRAD=request.need_grad, BLOCK=_BLOCK, SUMMED=triton.next_power_of_2(programs),
            num_warps=8, **FUSION,
        )  # fmt: skip
        sum_kernel[(1,)](sums, loss, sums.numel(), BLOCK=1024, num_warps=4, **FUSION)
    return loss, grad
