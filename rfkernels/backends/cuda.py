"""The CUDA C++ kernels: NVIDIA GPUs from sm_80 on, where the package was built with nvcc.

Host code and kernels are compiled (csrc/cuda_library.cpp, csrc/cuda/); here arguments are put in order.
"""

from __future__ import annotations

import torch

from .. import native
from . import reference
from ..contract.requests import CacheTensors, Past, RopeTables, open_frames
from ..contract.geometry import CacheGeometry, WindowMask

_ops = torch.ops.rfkernels_native

_DTYPES = (torch.float16, torch.bfloat16)
NO_ROPE = (None, None, False)
_NO_MASK = (0, 1, 1, 1, True)


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


def yields(device: torch.device) -> str | None:
    """Why `auto` takes Triton first where both run, or None."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9:
        return "on Hopper Triton's kernels use wgmma forward and backward, these in the forward, if built for 9.0a"
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
    _ops.begin_chunk(*cache, num_frames, new_frames, advancing, decay, *(rope or NO_ROPE), *geometry, before_window)


def write(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
) -> None:
    _ops.write(*cache, num_frames, _rows(new_k), _rows(new_v), *(rope or NO_ROPE), *geometry)


def rotate(
    x: torch.Tensor,
    frames: torch.Tensor,
    rope: RopeTables,
    *,
    first_token: int = 0,
    inverse: bool = False,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`reference.rotate` in one launch; rope is not None."""
    return _ops.rotate(
        _rows(x), frames.contiguous(), first_token, rope.frame_tokens, *rope, inverse, dtype,
    )  # fmt: skip


# --- attention --------------------------------------------------------------------------------------------------------


def streaming_attention(q, new_k, new_v, cache, num_frames, rope, geometry, scale, full, return_lse):
    """The pass: one launch that writes, one that attends (and one that merges, where keys are split)."""
    write(cache, num_frames, new_k, new_v, rope, geometry)
    return _ops.attention_forward(
        _aligned(q), cache.k, cache.v, None, None, num_frames, geometry.frame_tokens, geometry.capacity, *_NO_MASK,
        *(rope or NO_ROPE), scale,
    )  # fmt: skip


def _rotated(x, rope: RopeTables | None, dtype: torch.dtype, frames, first_token: int = 0) -> torch.Tensor:
    turned = (
        reference.store(x, dtype) if rope is None else rotate(x, frames(), rope, first_token=first_token, dtype=dtype)
    )
    return _aligned(turned)


def _chunk_keys(k, v, past: Past, rope: RopeTables | None, geometry: CacheGeometry):
    """Past frames, stacked for as long as the call lasts, and the own keys as the cache would hold them."""
    count = k.shape[1] // geometry.frame_tokens
    own_k = _rotated(k, rope, past.dtype, lambda: open_frames(past.num_frames, count))
    own_v = _aligned(reference.store(v, past.dtype))
    past_k, past_v = reference.past_tensors(past) if past.k else (own_k[:, :0], own_v[:, :0])
    return past_k, past_v, own_k, own_v, past.num_frames, geometry.frame_tokens, geometry.capacity, *_NO_MASK


def _window_keys(k, v, rope: RopeTables | None, mask: WindowMask):
    tokens = 1 if rope is None else rope.frame_tokens
    k = _rotated(k, rope, v.dtype, lambda: torch.arange(k.shape[1], device=k.device)[None] // tokens)
    return k, _aligned(v), None, None, None, tokens, 0, *mask


def chunk_attention(q, k, v, past: Past, rope: RopeTables | None, geometry: CacheGeometry, scale: float):
    keys = _chunk_keys(k, v, past, rope, geometry)
    return _ops.attention_forward(_aligned(q), *keys, *(rope or NO_ROPE), scale)


def sink_window_attention(q, k, v, rope: RopeTables | None, mask: WindowMask, scale: float):
    return _ops.attention_forward(_aligned(q), *_window_keys(k, v, rope, mask), *(rope or NO_ROPE), scale)


def _gradients(grad_out, grad_lse, out, lse, qkv, turned, sink_turned, keys, rope, scale):
    """Queries are rotated in launches of their own: the backward reads them once for each tile of keys."""
    types = [torch.float32 if x.dtype == torch.float64 else x.dtype for x in qkv]
    grads = _ops.attention_backward(
        _aligned(grad_out), grad_lse, _aligned(out), lse, turned, sink_turned, *keys, *(rope or NO_ROPE), scale, *types
    )
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, qkv, strict=True))


def chunk_attention_backward(grad_out, grad_lse, q, k, v, out, lse, past: Past, rope, geometry, scale):
    count = q.shape[1] // geometry.frame_tokens
    turned = _rotated(q, rope, past.dtype, lambda: open_frames(past.num_frames, count))
    keys = _chunk_keys(k, v, past, rope, geometry)
    return _gradients(grad_out, grad_lse, out, lse, (q, k, v), turned, turned, keys, rope, scale)


def sink_window_attention_backward(grad_out, grad_lse, q, k, v, out, lse, rope, mask: WindowMask, scale):
    if rope is None:
        turned = sink_turned = _rotated(q, None, v.dtype, None)
    else:
        tokens, first = rope.frame_tokens, k.shape[1] - q.shape[1]
        index = torch.arange(first, k.shape[1], device=q.device)[None]
        frames, evicted = index // tokens, mask.evicted_frames(index, tokens)
        turned = _rotated(q, rope, v.dtype, lambda: frames, first % tokens)
        sink_turned = _rotated(q, rope, v.dtype, lambda: frames - evicted, first % tokens)
    keys = _window_keys(k, v, rope, mask)
    return _gradients(grad_out, grad_lse, out, lse, (q, k, v), turned, sink_turned, keys, rope, scale)


# --- Re-DMD -----------------------------------------------------------------------------------------------------------


def redmd_loss(
    x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale, need_grad
):
    latents = (None if t is None else t.contiguous() for t in (x, fake, real_cond, real_uncond, fake_uncond))
    mask = None if mask is None else mask.contiguous()
    return _ops.redmd_loss(*latents, weight.contiguous(), mask, guidance_scale, fake_guidance_scale, need_grad)


_FARTHEST_TOKENS = 2**24  # elements from token to token: a tile's offsets then stay within 2**31 bytes


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x, with rows that the attention kernels can copy: at multiples of 16 bytes, not too far from each other."""
    item = x.element_size()
    whole = all(
        size <= 1 or stride * item % 16 == 0 for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    )
    x = x if x.dtype != torch.float64 else x.float()
    return (
        x
        if x.stride(-1) == 1 and whole and x.stride(1) < _FARTHEST_TOKENS and x.storage_offset() * item % 16 == 0
        else x.clone(memory_format=torch.contiguous_format)
    )


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def forward_kernels(device: torch.device) -> str:
    """The generation of the kernels that serve the forward pass there."""
    return "mma.sync"
