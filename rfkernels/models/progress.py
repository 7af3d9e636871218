"""A bar of frames with their rate."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, frames: int) -> None:
        pass


def frames_bar(total: int | None, progress: bool | None) -> AbstractContextManager[Any]:
    """tqdm's bar of frames, or what stands in for it."""
    if progress is False:
        return _NoBar()
    try:
        from tqdm import tqdm
    except ImportError:
        if progress:
            raise
        return _NoBar()
    return tqdm(total=total, unit=" frames", disable=None if progress is None else False)
