"""Three-dimensional rotary position embedding, as tables that every kernel shares."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from . import addresses
from .contract.requests import RopeTables


class Rope3D:
    """Rotary embedding over (frame, row, column), as in Wan 2.1 and in Reward Forcing (arXiv 2512.04678).

    Of the ``head_dim / 2`` pairs the first ``split[0]`` turn with the frame number, the next ``split[1]`` with the
    row, the rest with the column. Pair ``i`` of an axis with ``p`` pairs turns by ``theta ** (-i / p)`` radians a step.

    Args:
        head_dim: size of a head, even.
        height, width: rows and columns of tokens in a latent frame (after patchify). Both None: no spatial axes,
            every pair turns with the frame, as in a 1-D model (there a frame is usually one token).
        theta: base of the frequencies.
        split: pairs per axis; default ``(c - 2 * (c // 3), c // 3, c // 3)`` with ``c = head_dim // 2``, or
            ``(c, 0, 0)`` without spatial axes.
        pairing: ``"interleaved"`` rotates (2i, 2i + 1), ``"half"`` rotates (i, i + head_dim / 2).
        frequencies: radians per step of each pair, one 1-D tensor an axis (frame, row, column), in place of ``theta``
            (scaled rotary embeddings). Without spatial axes a single tensor will do.

    Raises:
        ValueError: sizes that do not fit each other; TypeError: frequencies that are not floating-point tensors.
    """

    def __init__(
        self,
        head_dim: int,
        height: int | None = None,
        width: int | None = None,
        theta: float = 10000.0,
        *,
        split: tuple[int, int, int] | None = None,
        pairing: str = "interleaved",
        frequencies: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ):
        if head_dim < 2 or head_dim % 2:
            raise ValueError(f"head_dim must be even and positive, got {head_dim}")
        if (height is None) != (width is None):
            raise ValueError(f"height and width go together, got height={height}, width={width}")
        if any(size is not None and size < 1 for size in (height, width)):
            raise ValueError(f"height and width must be at least 1, got {height} and {width}")
        if pairing not in ("interleaved", "half"):
            raise ValueError(f'pairing must be "interleaved" or "half", got {pairing!r}')
        if not theta > 0:
            raise ValueError(f"theta must be positive, got {theta}")
        given = None if frequencies is None else _as_axes(frequencies)
        own = _default_split(head_dim // 2, height is not None, given) if split is None else split
        self.split = tuple(int(p) for p in own)
        self._check_split(head_dim // 2, height is not None, given)
        self.head_dim, self.height, self.width, self.pairing = head_dim, height, width, pairing
        self.frequencies = _default_frequencies(theta, self.split) if given is None else given
        self._tables: dict[tuple[torch.device, torch.dtype, int], RopeTables] = {}

    def _check_split(self, pairs: int, spatial: bool, frequencies: tuple[torch.Tensor, ...] | None) -> None:
        split = self.split
        if len(split) != 3 or min(split) < 0 or sum(split) != pairs:
            raise ValueError(f"split must be three counts that sum to head_dim / 2 = {pairs}, got {split}")
        if not spatial and split[1:] != (0, 0):
            raise ValueError(f"split gives pairs to rows or columns, {split}, but height and width are None")
        if frequencies is not None and tuple(f.numel() for f in frequencies) != split:
            raise ValueError(f"frequencies have {[f.numel() for f in frequencies]} entries, split is {split}")

    @property
    def frame_tokens(self) -> int | None:
        """Tokens of a frame, ``height * width``; None without spatial axes (any number then)."""
        return None if self.height is None or self.width is None else self.height * self.width

    def tables(self, device: torch.device, dtype: torch.dtype, frame_tokens: int | None = None) -> RopeTables:
        """The tables on ``device`` for tensors of ``dtype`` (kept; float64 tables for float64, else float32)."""
        frame_tokens = self.frame_tokens or frame_tokens or 1
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        key = (torch.device(device), precision, frame_tokens)
        if key not in self._tables:
            with torch.inference_mode(False):  # kept beyond the call, for training too
                frame_turns = (self.frequencies[0] / (2 * math.pi)).to(device)
                spatial = self._spatial(frame_tokens).to(device, precision)
                addresses.fixed(frame_turns, spatial)
                self._tables[key] = RopeTables(frame_turns, spatial, self.pairing == "half")
        return self._tables[key]

    def _spatial(self, frame_tokens: int) -> torch.Tensor:
        if self.height is None or self.width is None:
            return torch.zeros(frame_tokens, 0, 2, dtype=torch.float64)
        rows = torch.arange(self.height, dtype=torch.float64).repeat_interleave(self.width)
        columns = torch.arange(self.width, dtype=torch.float64).repeat(self.height)
        angles = torch.cat([torch.outer(rows, self.frequencies[1]), torch.outer(columns, self.frequencies[2])], 1)
        return torch.stack([angles.cos(), angles.sin()], -1)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Rope3D)
            and (self.head_dim, self.height, self.width, self.split, self.pairing)
            == (other.head_dim, other.height, other.width, other.split, other.pairing)
            and all(torch.equal(a, b) for a, b in zip(self.frequencies, other.frequencies, strict=True))
        )

    def __hash__(self) -> int:
        frequencies = tuple(tuple(axis.tolist()) for axis in self.frequencies)
        return hash((self.head_dim, self.height, self.width, self.split, self.pairing, frequencies))

    def __repr__(self) -> str:
        size = "" if self.height is None else f", height={self.height}, width={self.width}"
        return f"Rope3D(head_dim={self.head_dim}{size}, split={self.split}, pairing={self.pairing!r})"


def _default_split(pairs: int, spatial: bool, frequencies: tuple[torch.Tensor, ...] | None) -> tuple[int, ...]:
    if frequencies is not None:
        return tuple(f.numel() for f in frequencies)
    return (pairs - 2 * (pairs // 3), pairs // 3, pairs // 3) if spatial else (pairs, 0, 0)


def _default_frequencies(theta: float, split: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor([theta ** (-i / p) for i in range(p)], dtype=torch.float64) for p in split)


def _as_axes(frequencies: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    axes = (frequencies,) if isinstance(frequencies, torch.Tensor) else tuple(frequencies)
    for axis in axes:
        if not isinstance(axis, torch.Tensor) or not axis.is_floating_point() or axis.dim() != 1:
            raise TypeError("frequencies must be 1-D floating-point tensors, one for each axis")
    if len(axes) not in (1, 3):
        raise ValueError(f"frequencies must have one axis (frame) or three, got {len(axes)}")
    axes = tuple(axis.detach().to("cpu", torch.float64) for axis in axes)
    return axes + (axes[0].new_empty(0),) * (3 - len(axes))
