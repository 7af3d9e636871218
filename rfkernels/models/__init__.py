"""The reference model: a Wan-style causal video transformer built on the ops."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .checkpoints import from_pretrained, load_checkpoint, save_checkpoint
from .config import PRESETS, CausalWanConfig
from .lora import load_lora
from .sampler import StreamingSampler
from .settings import StreamSettings
from .wan import CausalWan, ChunkMask

if TYPE_CHECKING:
    from . import video
    from .video import encode_prompts

__all__ = [
    "PRESETS",
    "CausalWan",
    "CausalWanConfig",
    "ChunkMask",
    "StreamSettings",
    "StreamingSampler",
    "encode_prompts",
    "from_pretrained",
    "load_checkpoint",
    "load_lora",
    "save_checkpoint",
    "video",
]


def __getattr__(name: str) -> Any:
    if name in ("video", "encode_prompts"):  # imported at first use: the model needs no text encoder and no VAE
        video = importlib.import_module(f"{__name__}.video")
        return video if name == "video" else video.encode_prompts
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "encode_prompts", "video"})
