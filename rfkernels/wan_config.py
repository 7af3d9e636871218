"""A cache by the names of a Wan / Reward-Forcing configuration."""

from __future__ import annotations

from typing import Any

import torch

from . import checks
from .rope import Rope3D


def cache_arguments(
    local_attn_size: int,
    sink_size: int,
    *,
    num_layers: int = 30,
    dim: int = 1536,
    num_heads: int = 12,
    latent_height: int = 60,
    latent_width: int = 104,
    patch_size: tuple[int, int, int] = (1, 2, 2),
    dtype: torch.dtype = torch.bfloat16,
    sink_dtype: torch.dtype | str | None = "published",
    batch_size: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """Arguments of `EMASinkCache`; the defaults are the published 1.3B model at 832 x 480.

    Args:
        local_attn_size, sink_size: in frames; ``window_frames = local_attn_size - sink_size``.
        dim, num_heads, num_layers: of the model. latent_height, latent_width: before patches of ``patch_size``.
        sink_dtype: "published" averages in the cache's dtype, as the published weights ran (at alpha = 0.999 a bfloat16
            sink hardly moves). None averages in float32.
        options: alpha, sink_positions, device.

    Raises:
        ValueError: sizes that do not fit each other.
    """
    if checks.integer("local_attn_size", local_attn_size, 1) <= checks.integer("sink_size", sink_size, 0):
        raise ValueError(f"local_attn_size must exceed sink_size={sink_size}, got {local_attn_size}")
    if dim % num_heads:
        raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
    if latent_height % patch_size[1] or latent_width % patch_size[2]:
        raise ValueError(f"patch_size {patch_size} must divide the latent, {latent_height} x {latent_width}")
    height, width = latent_height // patch_size[1], latent_width // patch_size[2]
    return options | {
        "num_layers": num_layers,
        "batch_size": batch_size,
        "num_kv_heads": num_heads,
        "head_dim": dim // num_heads,
        "frame_tokens": height * width,
        "sink_frames": sink_size,
        "window_frames": local_attn_size - sink_size,
        "rope": Rope3D(dim // num_heads, height, width),
        "dtype": dtype,
        "sink_dtype": dtype if sink_dtype == "published" else sink_dtype,
    }
