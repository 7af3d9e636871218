"""Where a frame lives in the cache, and which keys a query sees (docs/semantics.md), in plain integer arithmetic.

The twin of ``csrc/geometry.h`` (``tests/test_geometry.py`` holds the two together). Everything takes Python ints or
int64 tensors alike, so the same lines serve the host's bookkeeping, the reference and device-side lengths.
"""

from __future__ import annotations

from typing import NamedTuple, TypeVar, overload

import torch

Number = TypeVar("Number", int, torch.Tensor)


@overload
def _where(condition: bool, yes: int, no: int) -> int: ...
@overload
def _where(condition: torch.Tensor, yes: torch.Tensor | int, no: torch.Tensor | int) -> torch.Tensor: ...
def _where(condition: bool | torch.Tensor, yes: torch.Tensor | int, no: torch.Tensor | int) -> torch.Tensor | int:
    return torch.where(condition, yes, no) if isinstance(condition, torch.Tensor) else (yes if condition else no)


class CacheGeometry(NamedTuple):
    """A cache of one layer is ``[sink_frames * frame_tokens | window_frames * frame_tokens]`` tokens."""

    sink_frames: int
    window_frames: int
    frame_tokens: int

    @property
    def capacity(self) -> int:
        """Frames that the buffer holds."""
        return self.sink_frames + self.window_frames

    def evicted_frames(self, num_frames: Number) -> Number:
        """Frames that have left the window of a stream of ``num_frames`` frames."""
        evicted = num_frames - self.capacity
        return _where(evicted > 0, evicted, 0)

    def valid_frames(self, num_frames: Number) -> Number:
        """Frames that the open chunk's queries see: always a prefix of the buffer."""
        return _where(num_frames < self.capacity, num_frames, self.capacity)

    def slot(self, frame: Number) -> Number:
        """The buffer's slot that holds ``frame``."""
        ring = self.sink_frames + (frame - self.sink_frames) % self.window_frames
        return _where(frame < self.sink_frames, frame, ring)

    def fuse_slot(self, frame: Number) -> Number:
        """The sink slot into which ``frame`` is fused when it leaves the window (needs ``sink_frames > 0``)."""
        return frame % self.sink_frames

    def sink_position(self, sink_slot: Number, num_frames: Number, before_window: bool) -> Number:
        """The frame number at which a sink slot's keys are rotated."""
        return sink_slot + (self.evicted_frames(num_frames) if before_window else 0)


class WindowMask(NamedTuple):
    """The visibility rule of full-sequence attention, in tokens; query ``i`` lies in the chunk [begin(i), end(i))."""

    sink_tokens: int
    window_tokens: int
    chunk_tokens: int
    first_chunk_tokens: int  # equal to chunk_tokens unless the first chunk has another length
    own_chunk: bool = True  # False: a query does not see its own chunk

    def chunk_end(self, i: Number) -> Number:
        first, chunk = self.first_chunk_tokens, self.chunk_tokens
        return _where(i < first, first, first + ((i - first) // chunk + 1) * chunk)

    def chunk_begin(self, i: Number) -> Number:
        return _where(i < self.first_chunk_tokens, 0, self.chunk_end(i) - self.chunk_tokens)

    def limit(self, i: Number) -> Number:
        """Keys from here on are the future of query ``i``."""
        return self.chunk_end(i) if self.own_chunk else self.chunk_begin(i)

    def visible(self, i: Number, j: Number) -> Number:
        """Whether query ``i`` sees key ``j``: a bool, or a tensor of them."""
        recent = j >= self.chunk_end(i) - self.window_tokens
        return (j < self.limit(i)) & (recent | (j < self.sink_tokens))

    def evicted_frames(self, i: Number, frame_tokens: int) -> Number:
        """Frames evicted when the chunk of query ``i`` is open in a stream: sinks stand that much later."""
        evicted = (self.chunk_end(i) - self.sink_tokens - self.window_tokens) // frame_tokens
        return _where(evicted > 0, evicted, 0)
