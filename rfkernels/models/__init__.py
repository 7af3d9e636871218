"""The reference model: a Wan-style causal video transformer built on the ops."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from .checkpoints import from_pretrained, load_checkpoint, save_checkpoint
from .config import PRESETS, CausalWanConfig
from .sampler import StreamingSampler
from .settings import StreamSettings
from .wan import CausalWan, ChunkMask

if TYPE_CHECKING:
    from . import video

__all__ = [
    "PRESETS",
    "CausalWan",
    "CausalWanConfig",
    "ChunkMask",
    "StreamSettings",
    "StreamingSampler",
    "from_pretrained",
    "load_checkpoint",
    "save_checkpoint",
    "video",
]


def __getattr__(name: str) -> ModuleType:
    if name == "video":  # imported at first use: the model needs no text encoder and no VAE
        return importlib.import_module(f"{__name__}.video")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), "video"})
