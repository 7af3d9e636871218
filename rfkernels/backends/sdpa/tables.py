"""What all layers and passes of an open chunk have in common: where its frames go, and the factors that rotate them.

`prepare_chunk` computes it once a chunk, for tensors whose addresses stay: a captured CUDA graph reads what the next
chunk has left there. It is found again by the tensor of lengths, and only while those are what it was computed from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ...contract.geometry import CacheGeometry
from ...contract.requests import RopeTables, open_frames
from .rotation import Turn, turn_of


class ChunkTables(NamedTuple):
    """frames: int64 ``[B, F]``, as `open_frames`. samples ``[B, 1]`` and slots ``[B, F]`` index where they lie."""

    frames: torch.Tensor
    samples: torch.Tensor
    slots: torch.Tensor
    turn: Turn | None


class _Kept(NamedTuple):
    """Tables, what they are of, and the version of the lengths that they were computed from."""

    tables: ChunkTables
    rope: RopeTables | None
    geometry: CacheGeometry
    version: int


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of a cache's num_frames: by frames of a chunk, a _Kept


def _computed(num_frames: torch.Tensor, frames: int, rope: RopeTables | None, geometry: CacheGeometry) -> ChunkTables:
    opened = open_frames(num_frames, frames)
    # A stream that lacks some has frames 0 .. N - 1, in slots of the same number: N .. F - 1 are free.
    slots = torch.where(opened >= 0, geometry.slot(opened), opened + frames)
    turn = None if rope is None else turn_of(opened, rope, frames * geometry.frame_tokens)
    samples = torch.arange(len(opened), device=opened.device)[:, None]
    return ChunkTables(opened, samples, slots, turn)


def prepare_chunk(
    num_frames: torch.Tensor, after: torch.Tensor, frames: int, rope: RopeTables | None, geometry: CacheGeometry
) -> Callable[[], None]:
    """Computes the tables of a chunk that opens when ``num_frames`` becomes ``after``.

    Returns what puts them where `chunk_tables` finds them, to be called then. It takes no memory.
    """
    with torch.inference_mode(False):  # kept beyond the call
        fresh = _computed(after, frames, rope, geometry)

    def commit() -> None:
        kept: dict[int, _Kept] = _kept.setdefault(num_frames, {})
        old, tables = kept.get(frames), fresh
        if old is not None and old.rope is rope and old.geometry == geometry:
            for mine, new in zip(_tensors(old.tables), _tensors(fresh), strict=True):
                mine.copy_(new)
            tables = old.tables
        kept[frames] = _Kept(tables, rope, geometry, num_frames._version)

    return commit


def prepared(num_frames: torch.Tensor, frames: int) -> bool:
    """Whether a chunk of so many frames of these streams has ever been prepared: a graph may read its tables."""
    return frames in _kept.get(num_frames, ())


def _tensors(tables: ChunkTables) -> list[torch.Tensor]:
    return [tables.frames, tables.slots, *([] if tables.turn is None else tables.turn[:2])]


def chunk_tables(
    num_frames: torch.Tensor, frames: int, rope: RopeTables | None, geometry: CacheGeometry
) -> ChunkTables:
    """The tables of the open chunk: those that were prepared, where they are still true, or computed anew."""
    kept: dict[int, _Kept] = _kept.get(num_frames, {})
    found = kept.get(frames)
    if (
        found is not None
        and found.version == num_frames._version
        and found.geometry == geometry
        and (found.rope is rope or _same(found.rope, rope))
    ):
        return found.tables
    return _computed(num_frames, frames, rope, geometry)


def _same(a: RopeTables | None, b: RopeTables | None) -> bool:
    """A request that has been flat holds the same tensors in another tuple."""
    if a is None or b is None:
        return a is b
    return a.frame_turns is b.frame_turns and a.spatial is b.spatial and a.half_split == b.half_split
