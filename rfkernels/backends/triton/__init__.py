"""Attention, cache updates and the loss by Triton kernels: NVIDIA GPUs from sm_80 on, or Triton's interpreter.

Kernels are launched plainly inside the ops' bodies (which torch.compile does not look into), not traced through
triton_op: a define/impl op costs about 5 us a call, and nothing would be gained by showing inductor an opaque kernel.
Modules with kernels are imported at the first call, so that importing rfkernels neither needs nor loads Triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import sys
from types import SimpleNamespace
from typing import Any

import torch

from ...contract.requests import (
    BeginChunk,
    ChunkAttention,
    ChunkGradients,
    ReDMD,
    StreamingAttention,
    WindowAttention,
    WindowGradients,
    Write,
)

OLDEST_TRITON = (3, 6)  # structs as arguments of kernels
_HEAD_DIMS = range(32, 257, 16)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_Attention = tuple[torch.Tensor, torch.Tensor]
_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# --- whether it can run -----------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before import)."""
    if "triton" not in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        return False  # without the flag there is no need to import Triton to know
    import triton

    return triton.knobs.runtime.interpret


@functools.cache
def _interpreter_fault() -> str | None:
    """Why the interpreter of this Triton does not work here, or None."""
    import triton

    numpy = importlib.metadata.version("numpy")  # the interpreter's own dependency
    if version_numbers(triton.__version__) < (3, 7) and version_numbers(numpy) >= (2, 4):
        return f"the interpreter of Triton {triton.__version__} needs numpy < 2.4, here is {numpy}"
    return None


@functools.cache  # a search of the file system
def _found() -> str | None:
    """What is wrong with the Triton that an import would find, or None. It is not imported for that."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return _too_old(importlib.metadata.version(name))
    return None


def _too_old(version: str) -> str | None:
    if version_numbers(version) >= OLDEST_TRITON:
        return None
    return f"Triton {version} is older than {'.'.join(map(str, OLDEST_TRITON))}, which the kernels need"


def version_numbers(version: str) -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(x) for x in version.split(".")[:2])


def _absent() -> str | None:
    """Why there is no Triton that serves, or None."""
    if "triton" not in sys.modules:
        return _found()
    triton = sys.modules["triton"]
    if triton is None:  # which blocks an import
        return "Triton is not installed (pip install triton)"
    return _too_old(triton.__version__)


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``, or None."""
    if reason := _absent():
        return reason
    if device.type == "cpu":
        if not interpreted():
            return "on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before import"
        return _interpreter_fault()
    if device.type != "cuda":
        return f"Triton kernels here are for CUDA devices, not {device.type}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100, RTX 30) or later"
    return None


def unsupported(operation: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the kernels do not serve an operation on tensors like these, or None."""
    if dtype not in _DTYPES:
        return f"the Triton kernels serve float16, bfloat16 and float32, got {dtype}"
    if head_dim is not None and head_dim not in _HEAD_DIMS:
        return f"the Triton kernels serve a head_dim that is a multiple of 16 in 32..256, got {head_dim}"
    if dtype == torch.bfloat16 and "attention" in operation and interpreted():
        return "Triton's interpreter forms wrong products of bfloat16 matrices"
    return None


# --- the operations ---------------------------------------------------------------------------------------------------


@functools.cache  # an import statement costs the host two microseconds a launch
def _modules() -> Any:
    from . import attention, backward, cache_kernels, loss

    return SimpleNamespace(attention=attention, backward=backward, cache_kernels=cache_kernels, loss=loss)


def begin_chunk(request: BeginChunk) -> None:
    _modules().cache_kernels.begin_chunk(request)


def write(request: Write) -> None:
    _modules().cache_kernels.write(request)


def streaming_attention(request: StreamingAttention) -> _Attention:
    return _modules().attention.streaming_attention(request)


def chunk_attention(request: ChunkAttention) -> _Attention:
    return _modules().attention.chunk_attention(request)


def chunk_attention_backward(request: ChunkGradients) -> _Gradients:
    return _modules().backward.chunk_attention_backward(request)


def sink_window_attention(request: WindowAttention) -> _Attention:
    return _modules().attention.sink_window_attention(request)


def sink_window_attention_backward(request: WindowGradients) -> _Gradients:
    return _modules().backward.sink_window_attention_backward(request)


def redmd_loss(request: ReDMD) -> tuple[torch.Tensor, torch.Tensor]:
    return _modules().loss.redmd_loss(request)
