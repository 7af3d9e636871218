"""Fused kernels for streaming video diffusion: sliding-window attention with EMA-fused sinks, as torch ops."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from .attention import (
    chunk_attention,
    dense_attention,
    merge_attention,
    sink_window_attention,
    streaming_attention,
)
from .backends import available_backends, explain_backends, use_backend
from .cache import CacheLayer, EMASinkCache
from .contexts import Context
from .contract import ops
from .rope import Rope3D

if TYPE_CHECKING:
    from . import integrations, losses, models, training

__version__ = "0.1.0"

__all__ = [
    "CacheLayer",
    "Context",
    "EMASinkCache",
    "Rope3D",
    "available_backends",
    "chunk_attention",
    "dense_attention",
    "explain_backends",
    "integrations",
    "losses",
    "merge_attention",
    "models",
    "ops",
    "sink_window_attention",
    "streaming_attention",
    "training",
    "use_backend",
]

_LAZY = ("integrations", "losses", "models", "training")  # imported at first use: the ops need none of what these need


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
