"""The CUDA C++ kernels: NVIDIA GPUs from sm_80 on, where the package was built with nvcc.

Host code and kernels are compiled (csrc/cuda_library.cpp, csrc/cuda/); here arguments are put in order.
"""

from __future__ import annotations

import torch

from .. import native
from ..arguments import CacheTensors
from ..geometry import CacheGeometry
from ..rope import NO_ROPE, RopeTables

_ops = torch.ops.rfkernels_native

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(device: torch.device) -> str | None:
    """Why the kernels do not run on ``device``, or None."""
    if native.cuda_missing is not None:
        return native.cuda_missing
    if device.type != "cuda":
        return f"CUDA kernels are for CUDA devices, not {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return "needs compute capability 8.0 (A100, RTX 30) or later"
    if not native.cuda_runs_on(capability):
        return f"built for {native.cuda_architectures}, which a GPU of capability {capability[0]}.{capability[1]} cannot run"
    return None


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
    _ops.begin_chunk(
        *cache, num_frames, new_frames, advancing, decay, *(rope or NO_ROPE), *geometry, before_window
    )


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


def redmd_loss(
    x, fake, real_cond, real_uncond, fake_uncond, weight, mask, guidance_scale, fake_guidance_scale, need_grad
):
    latents = (None if t is None else t.contiguous() for t in (x, fake, real_cond, real_uncond, fake_uncond))
    mask = None if mask is None else mask.contiguous()
    return _ops.redmd_loss(*latents, weight.contiguous(), mask, guidance_scale, fake_guidance_scale, need_grad)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
