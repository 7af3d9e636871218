"""Fused kernels for streaming video diffusion: sliding-window attention with EMA-fused sinks, as torch ops."""

from . import losses, models, ops, training
from .attention import chunk_attention, merge_attention, sink_window_attention, streaming_attention
from .backends import available_backends, explain_backends, use_backend
from .cache import CacheLayer, EMASinkCache
from .contexts import Context
from .rope import Rope3D

__version__ = "0.1.0"

__all__ = [
    "CacheLayer",
    "Context",
    "EMASinkCache",
    "Rope3D",
    "available_backends",
    "chunk_attention",
    "explain_backends",
    "losses",
    "merge_attention",
    "models",
    "ops",
    "sink_window_attention",
    "streaming_attention",
    "training",
    "use_backend",
]
