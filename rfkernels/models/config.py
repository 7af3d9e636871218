"""Sizes of the transformer, and the published ones by name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from .. import checks


@dataclass(frozen=True)
class CausalWanConfig:
    """Sizes of a `CausalWan`; the defaults are Wan2.1-T2V-1.3B.

    Args:
        dim, ffn_dim, num_heads, num_layers: of the transformer; num_heads divides dim, heads have an even size.
        in_channels, out_channels: of a latent frame; equal, as a text-to-video model has them.
        patch_size: (frames, rows, columns) of a patch. Frames must be 1: a chunk may be a single frame.
        text_dim: size of a text embedding. text_len: the length that embeddings are padded to by `generate` (Wan was
            trained on padded text); the model itself takes any length.
        freq_dim: size of the sinusoidal time embedding, even.
        qk_norm: RMSNorm of queries and keys. cross_attn_norm: LayerNorm before cross-attention.
        eps: of all norms. rope_theta: base of the rotary frequencies.

    Raises:
        ValueError, TypeError: naming the field.
    """

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    qk_norm: bool = True
    cross_attn_norm: bool = True
    eps: float = 1e-6
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type == "int":
                checks.integer(field.name, getattr(self, field.name), 1)
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        if len(self.patch_size) != 3 or self.patch_size[0] != 1 or min(self.patch_size) < 1:
            raise ValueError(f"patch_size must be (1, rows, columns), got {self.patch_size}")
        if self.dim % self.num_heads or self.head_dim % 2:
            raise ValueError(
                f"num_heads must divide dim into heads of even size, got dim={self.dim}, num_heads={self.num_heads}"
            )
        if self.in_channels != self.out_channels:
            # The flow has the latents' shape. 36 or more channels are those of an image or a video beside the noise.
            raise ValueError(
                f"in_channels must equal out_channels={self.out_channels}, as in a text-to-video model, got "
                f"{self.in_channels}: image-to-video models take an image beside the noisy latents"
            )
        if self.freq_dim % 2:
            raise ValueError(f"freq_dim must be even, got {self.freq_dim}")

    @property
    def head_dim(self) -> int:
        """Size of a head, ``dim / num_heads``."""
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame of ``height`` x ``width``.

        Raises:
            ValueError: not divisible by the patch size.
        """
        _, rows, columns = self.patch_size
        if height % rows or width % columns or min(height, width) < 1:
            raise ValueError(
                f"latent frames must be divisible by patches of {rows} x {columns}, got {height} x {width}"
            )
        return height // rows, width // columns

    @classmethod
    def preset(cls, name: str, **changes: Any) -> CausalWanConfig:
        """A published configuration (see `PRESETS`), with fields changed.

        Raises:
            ValueError: an unknown name.
        """
        if name not in PRESETS:
            raise ValueError(f"preset must be one of {sorted(PRESETS)}, got {name!r}")
        return replace(PRESETS[name], **changes)


PRESETS = {
    "wan2.1-t2v-1.3b": CausalWanConfig(),
    "wan2.1-t2v-14b": CausalWanConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40),
    "wan2.2-ti2v-5b": CausalWanConfig(dim=3072, ffn_dim=14336, num_heads=24, in_channels=48, out_channels=48),
    # Pixels of 32 x 32 RGB pictures in patches of 8: 16 tokens a frame. The one that ships trained.
    "tiny": CausalWanConfig(
        dim=256, ffn_dim=640, num_heads=4, num_layers=4, in_channels=3, out_channels=3, patch_size=(1, 8, 8),
        text_dim=16, text_len=2, freq_dim=64,
    ),
}  # fmt: skip
