"""The best dense attention that is installed, over a cache that our kernels fill.

The valid part of a cache is a prefix, so that any dense attention kernel serves a streaming pass. Keys, values and
queries are rotated and the cache is updated by the backend that `auto` takes for a write; one call of the library's
kernel attends. Libraries have no sinks beside a window and no merged pasts: everything else is done as `auto` has it
(`backends.choose`), gradients included.
"""

from __future__ import annotations

import contextlib
from types import ModuleType

import torch

from ...contract.requests import RopeTables, Rotate, StreamingAttention, accumulate_dtype, open_frames
from .. import reference
from ..layout import aligned_rows, unit_rows
from .flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
from .kernel import Kernel
from .sage import SageAttention
from .torch_kernels import TorchSDPA, TorchVarlen

NAME = "library"  # a kernel's backend is "library:<its name>"
KERNELS = (FlashAttention2(), FlashAttention3(), FlashAttention4(), TorchVarlen(), TorchSDPA(), SageAttention())
# The first that serves, by generation of the GPU and by what they are made of: not measured. 9.x and 10.x need kernels
# made for them, and torch has cuDNN's. torch_sdpa serves everything; what quantises is not taken.
_FIRST = {
    9: ("flash_attn_3", "flash_attn_4", "torch_varlen", "torch_sdpa"),
    10: ("flash_attn_4", "torch_varlen", "torch_sdpa"),
    11: ("flash_attn_4", "torch_varlen", "torch_sdpa"),
}
_ELSEWHERE = ("flash_attn_2", "torch_varlen", "flash_attn_4", "torch_sdpa")


def _ours(operation: str, x: torch.Tensor) -> tuple[str, ModuleType]:
    """The backend that `auto` takes for an operation on a cache's tensor, by name and module."""
    from .. import choose, module  # which themselves use this package

    name = choose(operation, x.device, x.dtype, x.shape[-1], "auto").backend
    return name, module(name)


def _rotated(
    backend: str, q: torch.Tensor, num_frames: torch.Tensor, frames: int, rope: RopeTables | None, dtype: torch.dtype
) -> torch.Tensor:
    """Queries of the newest frames of each stream as its keys meet them, by the backend's kernel, in dtype."""
    if rope is None:
        return aligned_rows(reference.store(q, dtype))
    if backend == "triton":
        from ..triton.rotation import rotate

        return rotate(q, rope, dtype, num_frames=num_frames)
    at = open_frames(num_frames, frames)
    if backend == "cuda":
        from ..cuda import compiled

        q = q.float() if q.dtype == torch.float64 else q
        return compiled.rotate(Rotate(unit_rows(q), at, 0, rope, False, dtype))
    from .. import sdpa

    return sdpa.rotate(q, at, rope, dtype=dtype)


def _recording() -> bool:
    """Whether a CUDA graph is: what it holds must not depend on what the host knows now."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _elsewhere(operation: str) -> str | None:
    """Why libraries have no part in an operation, or None."""
    return None if operation == "streaming_attention" else f"{operation} is done as by auto: libraries attend in passes"


class Library:
    """The backend of one kernel. `backends.choose` hands it streaming passes only."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel

    def unavailable(self, device: torch.device) -> str | None:
        return self.kernel.unavailable(device)

    def refusal(self, operation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
        return _elsewhere(operation) or self.kernel.refusal(device, dtype, head_dim or 0)

    def reads_full(self, device: torch.device) -> bool:
        """A full window has no lengths to compute and no rows to clear; some kernels serve nothing else."""
        return device.type != "cpu"

    def note(self, device: torch.device) -> str:
        """For `explain_backends`, where it is available."""
        when = "" if self.kernel.takes_lengths(device) else " once every window is full"
        quantises = ", which quantises: less exact than the others" if self.kernel.quantises else ""
        return f"streaming passes by {self.kernel.about}{when}{quantises}"

    def streaming_attention(self, request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes, rotates the queries, attends; three launches where the window is known to be full."""
        q, written, scale, full, return_lse = request
        k, v = written.cache.k, written.cache.v
        if not (full or self.kernel.takes_lengths(k.device)):
            return _ours("streaming_attention", k)[1].streaming_attention(request)
        if self.kernel.takes_lengths(k.device) and _recording():
            full = False
        name, ours = _ours("write", k)
        ours.write(written)
        geometry, num_frames = written.geometry, written.num_frames
        frames = q.shape[1] // geometry.frame_tokens
        q = _rotated(name, q, num_frames, frames, written.rope, k.dtype)
        if scale <= 0:  # a running maximum needs a positive one
            q, scale = (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)
        lengths = None
        if not full:
            lengths = (geometry.valid_frames(num_frames) * geometry.frame_tokens).to(torch.int32)
        # Of the kernels some launch on the current device, and SageAttention changes it.
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            out, lse = self.kernel.attend(q, k, v, lengths, scale, return_lse)
        out = out.contiguous()
        lse = q.new_empty(0, dtype=accumulate_dtype(q.dtype)) if lse is None else lse.contiguous()
        if not full:
            _clear_missing(out, lse if return_lse else None, open_frames(num_frames, frames) < 0)
        return out, lse


def _clear_missing(out: torch.Tensor, lse: torch.Tensor | None, missing: torch.Tensor) -> None:
    """Zeros, and -inf, in the rows of frames ``missing [B, F]`` that a young stream does not have."""
    tokens = out.shape[1] // missing.shape[1]
    out.unflatten(1, (-1, tokens)).masked_fill_(missing[:, :, None, None, None], 0)
    if lse is not None:
        lse.unflatten(2, (-1, tokens)).masked_fill_(missing[:, None, :, None], -torch.inf)


class Best:
    """``"library"``: the first that serves, in whose place `backends.choose` puts that one's name."""

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, operation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
        return _elsewhere(operation)

    def note(self, device: torch.device) -> str:
        """For `explain_backends`."""
        return (
            f"our cache kernels, and streaming passes as by {first(device, torch.bfloat16, 128)}; all else as by auto"
        )


def first(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The name of the best kernel's backend for a pass over a cache of that dtype and head_dim."""
    known = device.type == "cuda" and torch.version.cuda and torch.cuda.is_available()
    generation = torch.cuda.get_device_capability(device)[0] if known else 0
    names = (f"{NAME}:{name}" for name in _FIRST.get(generation, _ELSEWHERE))
    return next(
        name for name in names if BACKENDS[name].refusal("streaming_attention", device, dtype, head_dim) is None
    )


BACKENDS: dict[str, Library | Best] = {NAME: Best()} | {f"{NAME}:{kernel.name}": Library(kernel) for kernel in KERNELS}
