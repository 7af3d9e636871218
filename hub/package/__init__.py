"""Attention over a sliding window and sinks, with its streaming cache and the Re-DMD loss, as Triton kernels."""

from .attention import chunk_attention, dense_attention, merge_attention, sink_window_attention, streaming_attention
from .backends import available_backends, explain_backends, use_backend
from .cache import CacheLayer, EMASinkCache
from .contexts import Context
from .losses import ReDMDLoss, effective_sample_size, redmd_loss, reward_weights
from .rope import Rope3D

__all__ = [
    "CacheLayer",
    "Context",
    "EMASinkCache",
    "ReDMDLoss",
    "Rope3D",
    "available_backends",
    "chunk_attention",
    "dense_attention",
    "effective_sample_size",
    "explain_backends",
    "merge_attention",
    "redmd_loss",
    "reward_weights",
    "sink_window_attention",
    "streaming_attention",
    "use_backend",
]
