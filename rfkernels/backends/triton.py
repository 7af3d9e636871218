"""Attention, cache updates and the loss by Triton kernels: NVIDIA GPUs from sm_80 on, or Triton's interpreter.

Kernels are launched plainly inside the ops' bodies (which torch.compile does not look into), not traced through
triton_op: a define/impl op costs about 5 us a call, and nothing would be gained by showing inductor an opaque kernel.
Modules with kernels are imported at the first call, so that importing rfkernels neither needs nor loads Triton.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from ..contract.geometry import CacheGeometry, WindowMask
from ..contract.requests import CacheTensors, Past, RopeTables

_HEAD_DIMS = range(32, 257, 16)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 before import)."""
    if "triton" not in sys.modules and not os.environ.get("TRITON_INTERPRET"):
        return False  # without the flag there is no need to import Triton to know
    import triton

    return triton.knobs.runtime.interpret


def _installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ValueError:  # a module without a spec stands in its place, e.g. to block it
        return False


def unavailable(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``, or None."""
    if not _installed():
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu":
        return None if interpreted() else "on a CPU only in Triton's interpreter: set TRITON_INTERPRET=1 before import"
    if device.type != "cuda":
        return f"Triton kernels here are for CUDA devices, not {device.type}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.cuda and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0 (A100, RTX 30) or later"
    return None


# What torch.compiler.assume_constant_result sets, which imports the compiler: the answer is asked for while a call is
# traced, and Triton's own settings cannot be.
unavailable._dynamo_marked_constant = True


def unsupported(operation: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the kernels do not serve a dtype and head_dim, or None."""
    if dtype not in _DTYPES:
        return f"the Triton kernels serve float16, bfloat16 and float32, got {dtype}"
    if head_dim is not None and head_dim not in _HEAD_DIMS:
        return f"the Triton kernels serve a head_dim that is a multiple of 16 in 32..256, got {head_dim}"
    return None


# --- the cache --------------------------------------------------------------------------------------------------------


def begin_chunk(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_frames: int,
    advancing: torch.Tensor | None,
    decay: torch.Tensor | None,
    rope: RopeTables | None,
    geometry: CacheGeometry,
    before_window: bool,
) -> None:
    from ..triton import cache as kernels

    kernels.begin_chunk(cache, num_frames, new_frames, advancing, decay, rope, geometry, before_window)


def write(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
) -> None:
    from ..triton import cache as kernels

    kernels.write(cache, num_frames, new_k, new_v, rope, geometry)


# --- attention --------------------------------------------------------------------------------------------------------


def streaming_attention(q, new_k, new_v, cache, num_frames, rope, geometry, scale, full, return_lse):
    """The pass: one launch that writes, one that attends (and one that merges, where keys are split)."""
    from ..triton.forward import Keys, attend

    write(cache, num_frames, new_k, new_v, rope, geometry)
    keys = Keys(cache.k, cache.v, num_frames=num_frames, capacity=geometry.capacity, frame_tokens=geometry.frame_tokens)
    return attend(q, keys, rope, scale)


def _chunk_keys(k, v, past: Past, rope, geometry: CacheGeometry):
    """Past frames, stacked for as long as the call lasts, and the chunk's own keys as the cache would hold them."""
    from ..triton.cache import rotate
    from ..triton.forward import Keys
    from . import reference

    own_k = rotate(k, rope, past.dtype, num_frames=past.num_frames)
    own_v = rotate(v, None, past.dtype)
    past_k, past_v = reference.past_tensors(past) if past.k else (own_k[:, :0], own_v[:, :0])
    return Keys(past_k, past_v, own_k, own_v, past.num_frames, geometry.capacity, geometry.frame_tokens)


def chunk_attention(q, k, v, past: Past, rope: RopeTables | None, geometry: CacheGeometry, scale: float):
    from ..triton.forward import attend

    return attend(q, _chunk_keys(k, v, past, rope, geometry), rope, scale)


def chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, past, rope, geometry, scale):
    from ..triton.backward import gradients

    keys = _chunk_keys(k, v, past, rope, geometry)
    return gradients(grad_out, grad_lse, q, k, v, out, lse, keys, rope, scale)


def _window_keys(k, v, rope, mask):
    from ..triton.cache import rotate
    from ..triton.forward import Keys
    from ..triton.launch import rows

    return Keys(rotate(k, rope, v.dtype), rows(v), mask=mask)


def sink_window_attention(q, k, v, rope: RopeTables | None, mask: WindowMask, scale: float):
    from ..triton.forward import attend

    return attend(q, _window_keys(k, v, rope, mask), rope, scale)


def sink_window_attention_backward(grad_out, grad_lse, q, k, v, out, lse, rope, mask, scale):
    from ..triton.backward import gradients

    keys = _window_keys(k, v, rope, mask)
    return gradients(grad_out, grad_lse, q, k, v, out, lse, keys, rope, scale)


# --- Re-DMD -----------------------------------------------------------------------------------------------------------


def redmd_loss(
    x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale, need_grad
):
    from ..triton.loss import redmd_loss as kernels

    return kernels(
        x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale, need_grad
    )
