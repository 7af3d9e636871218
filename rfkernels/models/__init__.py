"""The reference model: a Wan-style causal video transformer built on the ops."""

from .config import PRESETS, CausalWanConfig
from .wan import CausalWan, ChunkMask

__all__ = ["PRESETS", "CausalWan", "CausalWanConfig", "ChunkMask"]
