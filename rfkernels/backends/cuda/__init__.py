"""The CUDA C++ kernels: NVIDIA GPUs from sm_80 on, where the package was built with nvcc.

Host code and kernels are compiled (csrc/host/cuda, csrc/cuda). Here requests are made readable for them: `compiled`
calls the operators, `attention` prepares what they take for contexts and full sequences, `requests` says what that is.
"""

from __future__ import annotations

import torch

from ... import native
from ...contract.requests import BeginChunk, ReDMD, StreamingAttention, Write
from ..layout import unit_rows
from . import compiled
from .attention import (
    chunk_attention,
    chunk_attention_backward,
    readable_queries,
    sink_window_attention,
    sink_window_attention_backward,
)

__all__ = [
    "begin_chunk",
    "chunk_attention",
    "chunk_attention_backward",
    "forward_kernels",
    "redmd_loss",
    "sink_window_attention",
    "sink_window_attention_backward",
    "streaming_attention",
    "unavailable",
    "unsupported",
    "write",
]

_DTYPES = (torch.float16, torch.bfloat16)


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``, or None."""
    if native.cuda_missing is not None:
        return native.cuda_missing
    if device.type != "cuda":
        return f"CUDA kernels are for CUDA devices, not {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    built, runs = native.cuda_version, torch.version.cuda or "none"
    if built.split(".")[0] != runs.split(".")[0]:
        return f"built with CUDA {built}, torch with CUDA {runs}: the major versions must be the same"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "needs compute capability 8.0 (A100, RTX 30) or later"
    if not native.cuda_runs_on(capability):
        number = f"{capability[0]}.{capability[1]}"
        return f"built for {native.cuda_architectures}, which a GPU of capability {number} cannot run"
    return None


def unsupported(operation: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the kernels do not serve a dtype and head_dim, or None. head_dim None: the loss, which has none."""
    if head_dim is None:
        return None if dtype != torch.float64 else "the CUDA loss serves float16, bfloat16 and float32, got float64"
    if dtype not in _DTYPES:
        return f"the CUDA kernels serve float16 and bfloat16 (attention by tensor cores), got {dtype}"
    if head_dim not in native.cuda_head_dims:
        return f"the CUDA kernels were built for head_dim {native.cuda_head_dims}, got {head_dim}"
    return None


def forward_kernels(device: torch.device) -> str:
    """Which instructions the attention forward multiplies with there: "wgmma" on 9.0 if built for it, or "mma.sync"."""
    built = native.cuda_architectures.split(", ")
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
    return "wgmma" if hopper and "9.0a" in built else "mma.sync"


def begin_chunk(request: BeginChunk) -> None:
    compiled.begin_chunk(request)


def _readable(request: Write) -> Write:
    if request.new_k.stride(-1) == request.new_v.stride(-1) == 1:
        return request  # as nearly always; making it anew would cost a microsecond
    return request._replace(new_k=unit_rows(request.new_k), new_v=unit_rows(request.new_v))


def write(request: Write) -> None:
    compiled.write(_readable(request))


def streaming_attention(request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch that writes, one that attends (and one that merges, where keys are shared)."""
    q, written = readable_queries(request.q), _readable(request.write)
    if q is not request.q or written is not request.write:
        request = request._replace(q=q, write=written)
    return compiled.streaming_attention(request)


def redmd_loss(request: ReDMD) -> tuple[torch.Tensor, torch.Tensor]:
    contiguous = (x.contiguous() if isinstance(x, torch.Tensor) else x for x in request)
    return compiled.redmd_loss(ReDMD._make(contiguous))
