"""What takes part in a benchmark: everything that does one operation, on the same inputs, and what the result must be.

Every contender has state of its own with the same history, so that its first call gives the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

import rfkernels as rf
from rfkernels import backends
from rfkernels.backends import library

from . import competitors
from .cases import Work
from .gate import Results

FLOOR = competitors.FLOOR
OURS = "rfkernels "  # and the backend's name


@dataclass
class Contender:
    """call: what is timed. read: the tensors to compare, from what it returned. around: entered outside the timing."""

    call: Callable[[], object]
    read: Callable[[object], Results]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Bench:
    """One operation on one case. skipped: why contenders are missing."""

    work: Work
    contenders: dict[str, Contender]
    exact: Results  # float64
    plain: Results  # plain PyTorch in the case's dtype
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    device: torch.device
    compiled: bool = True  # competitors that compile for many seconds take part
    seed: int = 0


def out_only(result) -> Results:
    return {"out": result}


def _backends(
    options: Options, dtype: torch.dtype, head_dim: int | None, skipped: dict[str, str], passes: bool
) -> Iterator[str]:
    for name, why in rf.explain_backends(options.device).items():
        # Of the libraries each by its name, where there is something that they do.
        if name in ("auto", library.NAME) or (name in library.BACKENDS and not passes):
            continue
        operation = "redmd_loss" if head_dim is None else "streaming_attention"
        reason = backends.refusal(name, operation, options.device, dtype, head_dim)
        if reason is None:
            yield name
        else:
            skipped[OURS + name] = why.removeprefix("not available: ") if why.startswith("not") else reason


def ours_of(
    options, dtype, head_dim, skipped, make: Callable[[], tuple[Callable, Callable]], passes: bool = False
) -> dict[str, Contender]:
    """A contender for each backend, with whatever ``make`` sets up for it. passes: it runs streaming passes."""
    found = {}
    for name in _backends(options, dtype, head_dim, skipped, passes):
        around = partial(rf.use_backend, name)
        with around():
            call, read = make()
        found[OURS + name] = Contender(call, read, around)
    return found


def peers_of(options, q, k, v, visible, skipped, repeat: int = 1) -> dict[str, Contender]:
    found = {}
    for row in competitors.TABLE:
        why_not = row.why_not(options.device, q.dtype, visible is not None)
        if why_not is None and row.compiles and not options.compiled:
            why_not = "compiles for many seconds: in few rows, or where -k asks for it"
        if why_not is not None:
            skipped[row.name] = why_not
            continue
        call = row.make(q, k, v, visible)
        found[row.name] = Contender(call if repeat == 1 else partial(_repeat, call, repeat), out_only)
    return found


def _repeat(call, count):
    for _ in range(count):
        out = call()
    return out


def exact_attention(q, k, v, visible=None) -> torch.Tensor:
    """In float64, head by head, so that the scores of one head are all that is held."""
    group = q.shape[2] // k.shape[2]
    heads = [
        competitors.ready_sdpa(q[:, :, h : h + 1], k[:, :, h // group, None], v[:, :, h // group, None], visible)()
        for h in range(q.shape[2])
    ]
    return torch.cat(heads, 2)


def forward_backward(function, inputs, grad_out):
    """out and the gradients of the inputs, as a call and its reader."""

    def call():
        with torch.enable_grad():
            out = function(*inputs)
            return out.detach(), *torch.autograd.grad(out, inputs, grad_out)

    def read(result) -> Results:
        return dict(zip(("out", "grad_q", "grad_k", "grad_v"), result, strict=False))

    return call, read
