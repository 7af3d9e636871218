"""Attention, cache updates and the loss by Triton kernels: NVIDIA GPUs from sm_80 on, or Triton's interpreter.

Kernels are launched plainly inside the ops' bodies (which torch.compile does not look into), not traced through
triton_op: a define/impl op costs about 5 us a call, and nothing would be gained by showing inductor an opaque kernel.
Modules with kernels are imported at the first call, so that importing rfkernels neither needs nor loads Triton.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import re
import sys

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

_HEAD_DIMS = range(32, 257, 16)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_OLDEST = (3, 6)  # that of torch 2.10, the oldest whose compiled kernels the emulator has run
_Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# --- whether it can run -----------------------------------------------------------------------------------------------


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before import)."""
    if "triton" not in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        return False  # without the flag there is no need to import Triton to know
    import triton

    return triton.knobs.runtime.interpret


@functools.cache  # a search of the file system
def _found() -> bool:
    return importlib.util.find_spec("triton") is not None


def _installed() -> bool:
    if "triton" in sys.modules:
        return sys.modules["triton"] is not None  # None blocks an import
    return _found()


@functools.cache
def version() -> tuple[int, int]:
    """Triton's version, major and minor; asked of the installed package, which need not be imported for that."""
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:  # a build under another name
        import triton

        text = triton.__version__
    return numbers(text)


def numbers(text: str) -> tuple[int, int]:
    """The first two numbers of a version such as ``3.6.0+git1234`` or ``2.4.0rc1``."""
    found = re.match(r"(\d+)\.(\d+)", text)
    if found is None:
        raise ValueError(f"a version must begin with two numbers, as 3.6, got {text!r}")
    return int(found[1]), int(found[2])


def interpreter_fails() -> str | None:
    """Why Triton's interpreter cannot run the kernels beside the installed numpy, or None."""
    if version() >= (3, 7):
        return None
    numpy = importlib.metadata.version("numpy")
    if numbers(numpy) < (2, 4):
        return None
    return (  # a loop's bounds are arrays of one element to it
        f"the interpreter of Triton {_written(version())} takes arrays for numbers, which numpy {numpy} refuses: "
        "it needs numpy < 2.4, or Triton 3.7"
    )


def _written(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``, or None."""
    if not _installed():
        return "Triton is not installed (pip install triton)"
    if version() < _OLDEST:
        return f"needs Triton {_written(_OLDEST)} or later (torch 2.10 brings it), found {_written(version())}"
    if device.type == "cpu" and not interpreted():
        return "on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before import"
    if device.type not in ("cpu", "cuda"):
        return f"Triton kernels here are for CUDA devices, not {device.type}"
    if interpreted():
        return interpreter_fails()
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


def begin_chunk(request: BeginChunk) -> None:
    from .cache_kernels import begin_chunk

    begin_chunk(request)


def write(request: Write) -> None:
    from .cache_kernels import write

    write(request)


def streaming_attention(request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention import streaming_attention

    return streaming_attention(request)


def chunk_attention(request: ChunkAttention) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention import chunk_attention

    return chunk_attention(request)


def chunk_attention_backward(request: ChunkGradients) -> _Gradients:
    from .backward import chunk_attention_backward

    return chunk_attention_backward(request)


def sink_window_attention(request: WindowAttention) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention import sink_window_attention

    return sink_window_attention(request)


def sink_window_attention_backward(request: WindowGradients) -> _Gradients:
    from .backward import sink_window_attention_backward

    return sink_window_attention_backward(request)


def redmd_loss(request: ReDMD) -> tuple[torch.Tensor, torch.Tensor]:
    from .loss import redmd_loss

    return redmd_loss(request)
