"""The reference model: a Wan-style causal video transformer built on the ops."""

from .checkpoints import from_pretrained, load_checkpoint, save_checkpoint
from .config import PRESETS, CausalWanConfig
from .sampler import StreamingSampler
from .settings import StreamSettings
from .wan import CausalWan, ChunkMask

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
]
