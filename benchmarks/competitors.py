"""What a user would call instead: one row a library, all on ready-made ``[B, N, H, D]`` queries, keys and values.

Each row says why it is not here, or makes a callable for given tensors. The adapters of libraries that are not
dependencies of this project (flash-attn, FlashInfer, xformers, SageAttention) were written from their documentation and
have never been run here; like everything else they are timed only if their result is right.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[], torch.Tensor]
Visible = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (query index, key index) -> whether it is seen


@dataclass(frozen=True)
class Competitor:
    """why_not: (device, dtype, masked) -> a reason, or None. make: (q, k, v, visible) -> the call, `[B, N, H, D]`.

    compiles: the first call takes many seconds, so that a quick run leaves it out.
    """

    name: str
    why_not: Callable[[torch.device, torch.dtype, bool], str | None]
    make: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Visible | None], Attend]
    compiles: bool = False


def _everywhere(device, dtype, masked):
    return None


def _library(module: str, masks: bool = False):
    def why_not(device, dtype, masked):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
        if device.type != "cuda":
            return f"{module} needs a CUDA device"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"{module} serves float16 and bfloat16"
        return f"{module} has no such mask" if masked and not masks else None

    return why_not


def _dense(q, k, visible: Visible | None) -> torch.Tensor | None:
    """The mask as a tensor, bool ``[N_q, N_k]``."""
    if visible is None:
        return None
    rows = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    return visible(rows, torch.arange(k.shape[1], device=q.device))


def ready_sdpa(q, k, v, visible, backend: SDPBackend | None = None) -> Attend:
    mask, grouped = _dense(q, k, visible), q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))  # ready-made

    def plain():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped).transpose(1, 2)

    def chosen():
        with sdpa_kernel(backend):
            return plain()

    return plain if backend is None else chosen


def _one_backend(backend: SDPBackend) -> Competitor:
    def why_not(device, dtype, masked):
        return None if device.type == "cuda" else "one of several on a CUDA device only"

    name = f"SDPA {backend.name.removesuffix('_ATTENTION').lower()}"
    return Competitor(name, why_not, lambda q, k, v, visible: ready_sdpa(q, k, v, visible, backend))


def _flex(q, k, v, visible) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, block_mask, grouped = torch.compile(flex_attention, dynamic=False), None, q.shape[2] != k.shape[2]
    if visible is not None:
        first = k.shape[1] - q.shape[1]
        block_mask = create_block_mask(
            lambda b, h, i, j: visible(i + first, j), None, None, q.shape[1], k.shape[1], device=str(q.device)
        )
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: compiled(q, k, v, block_mask=block_mask, enable_gqa=grouped).transpose(1, 2)


def _no_flex(device, dtype, masked):
    if device.type == "cpu" and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "flex_attention is compiled for AVX2 and later"
    return None


def _flash2(q, k, v, visible) -> Attend:
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(q, k, v)


def _flash3(q, k, v, visible) -> Attend:
    from flash_attn_interface import flash_attn_func

    def call():
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return call


def _flashinfer(q, k, v, visible) -> Attend:
    import flashinfer

    q, k, v = (x.squeeze(0) for x in (q, k, v))  # one sequence
    mask = _dense(q[None], k[None], visible)
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, custom_mask=mask, causal=False)[None]


def _xformers(q, k, v, visible) -> Attend:
    from xformers.ops import memory_efficient_attention

    if q.shape[2] != k.shape[2]:  # grouped heads are a dimension of their own: [B, N, groups, heads of a group, D]
        group = q.shape[2] // k.shape[2]
        q = q.unflatten(2, (k.shape[2], group))
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1) for x in (k, v))
    return lambda: memory_efficient_attention(q, k, v).reshape(*q.shape[:2], -1, q.shape[-1])


def _sage(q, k, v, visible) -> Attend:
    from sageattention import sageattn

    return lambda: sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


FLOOR = "SDPA"  # on ready-made contiguous tensors: what a streaming pass cannot beat with the same kernel

TABLE: tuple[Competitor, ...] = (
    Competitor(FLOOR, _everywhere, ready_sdpa),
    *(
        _one_backend(backend)
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
    ),
    Competitor("flex_attention", _no_flex, _flex, compiles=True),
    Competitor("flash-attn 2", _library("flash_attn"), _flash2),
    Competitor("flash-attn 3", _library("flash_attn_interface"), _flash3),
    Competitor("FlashInfer", _library("flashinfer", masks=True), _flashinfer, compiles=True),
    Competitor("xformers", _library("xformers"), _xformers),
    Competitor("SageAttention", _library("sageattention"), _sage),
)
