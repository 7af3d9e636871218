"""The shapes that are measured, as data, and what each operation on them costs at least.

``Work`` is the floating-point operations of the products that cannot be avoided (a multiply-add counts two) and the
bytes of every input read once and every output written once: no cache, no recomputation, no temporary. Softmax and
masks are not counted; a rotation is 3 operations an element.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch


class Work(NamedTuple):
    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: int) -> Work:
        return Work(self.flops * count, self.bytes * count)


@dataclass(frozen=True)
class Stream:
    """A streaming cache whose window is full: T = rows * columns tokens a frame, F frames a chunk, S sink, W window."""

    name: str
    rows: int = 30
    columns: int = 52
    frames: int = 3
    sink: int = 3
    window: int = 6
    heads: int = 12
    kv_heads: int = 12
    head_dim: int = 128
    layers: int = 30
    passes: int = 5  # four that denoise and one that writes the clean chunk
    alpha: float = 0.999
    dtype: torch.dtype = torch.bfloat16

    @property
    def frame_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def queries(self) -> int:
        return self.frames * self.frame_tokens

    @property
    def keys(self) -> int:
        return (self.sink + self.window) * self.frame_tokens

    @property
    def _query_bytes(self) -> int:
        """Of q, of out, or of a gradient like them, in one layer."""
        return self.queries * self.heads * self.head_dim * self.dtype.itemsize

    def _kv_bytes(self, tokens: int, size: int | None = None) -> int:
        """Of K and V together, in one layer."""
        return 2 * tokens * self.kv_heads * self.head_dim * (size or self.dtype.itemsize)

    def _products(self, keys: int) -> float:
        """One matrix product of all queries with ``keys`` keys, in one layer."""
        return 2.0 * self.queries * keys * self.heads * self.head_dim

    def begin_chunk(self) -> Work:
        """All layers: read what leaves, read and write the accumulators, write the sink's rotated image."""
        evicted, sink = self.queries if self.sink else 0, self.sink * self.frame_tokens
        accumulator = 4 if self.dtype.itemsize <= 4 else 8
        one = self.kv_heads * self.head_dim
        # K and V are fused (3 operations an element), evicted keys and the image are rotated.
        flops = evicted * one * (2 * 3 + 3) + sink * one * 3
        nbytes = self._kv_bytes(evicted) + 2 * self._kv_bytes(sink, accumulator) + self._kv_bytes(sink)
        return Work(flops, nbytes).times(self.layers)

    def write(self) -> Work:
        return Work(3.0 * self.queries * self.kv_heads * self.head_dim, 2 * self._kv_bytes(self.queries))

    def attention(self) -> Work:
        """A later pass of one layer: rotate and write K and V, rotate q, attend to everything in the cache."""
        rotated = 3.0 * self.queries * self.heads * self.head_dim
        past = self._kv_bytes(self.keys - self.queries)
        return self.write() + Work(2 * self._products(self.keys) + rotated, 2 * self._query_bytes + past)

    def streaming_pass(self) -> Work:
        return self.attention().times(self.layers)

    def chunk(self) -> Work:
        return self.begin_chunk() + self.streaming_pass().times(self.passes)

    def chunk_attention(self) -> Work:
        """Without a write: q, the chunk's K and V and the past are read; out and the normaliser written."""
        rotated = 3.0 * self.queries * (self.heads + self.kv_heads) * self.head_dim
        lse = 4 * self.queries * self.heads
        return Work(2 * self._products(self.keys) + rotated, 2 * self._query_bytes + self._kv_bytes(self.keys) + lse)

    def chunk_attention_training(self) -> Work:
        """Forward and backward. The past has no gradient: scores, their gradient and that of q need all keys, the
        gradients of K and V only the chunk's own."""
        backward = 3 * self._products(self.keys) + 2 * self._products(self.queries)
        # read q, out, its gradient and the normaliser, K, V; write the gradients of q, K and V
        nbytes = 4 * self._query_bytes + 4 * self.queries * self.heads
        nbytes += self._kv_bytes(self.keys) + self._kv_bytes(self.queries)
        return self.chunk_attention() + Work(backward, nbytes)


@dataclass(frozen=True)
class Sequence:
    """Attention of a whole sequence to sinks and a window, in tokens. rope: (rows, columns) of a frame, or None."""

    name: str
    tokens: int
    window: int
    sink: int
    chunk: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    rope: tuple[int, int] | None = None
    dtype: torch.dtype = torch.bfloat16

    @property
    def visible(self) -> int:
        """Pairs of a query and a key that it sees."""
        pairs = 0
        for start in range(0, self.tokens, self.chunk):
            end, stop = start + self.chunk, min(start + self.chunk, self.tokens)
            recent = stop - max(0, end - self.window)
            pairs += (stop - start) * (recent + max(0, min(self.sink, end - self.window)))
        return pairs

    def _bytes(self) -> tuple[int, int]:
        """Of q (or out), and of K and V together."""
        row = self.tokens * self.head_dim * self.dtype.itemsize
        return row * self.heads, 2 * row * self.kv_heads

    def forward(self) -> Work:
        q, kv = self._bytes()
        return Work(4.0 * self.visible * self.heads * self.head_dim, 2 * q + kv + 4 * self.tokens * self.heads)

    def training(self) -> Work:
        """Forward and backward: five products instead of two."""
        q, kv = self._bytes()
        backward = 10.0 * self.visible * self.heads * self.head_dim
        return self.forward() + Work(backward, 4 * q + 2 * kv + 4 * self.tokens * self.heads)


@dataclass(frozen=True)
class Latent:
    """The generated clip of the Re-DMD loss, with or without a mask over it."""

    name: str
    shape: tuple[int, ...] = (1, 21, 16, 60, 104)
    masked: bool = False
    dtype: torch.dtype = torch.float32

    def redmd(self) -> Work:
        """x, fake, cond and uncond (and the mask) are read, the gradient is written. About 10 operations an element."""
        elements = math.prod(self.shape)
        return Work(10.0 * elements, elements * (5 * self.dtype.itemsize + self.masked))


Case = Stream | Sequence | Latent

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Stream("paper"),  # 832 x 480: T = 1560
        Stream("half", 15, 26),  # half the resolution: T = 390
        Stream("quarter", 10, 10),  # about a quarter: T = 100
        Stream("frames", frames=1),  # single-frame chunks
        Stream("longlive", window=9),
        Stream("wan5b", 22, 40, frames=8, window=32, heads=24, kv_heads=24),  # T = 880
        Stream("gqa", heads=24, kv_heads=8),
        Stream("window21", window=21),
        Sequence("clip-quarter", 1200, window=600, sink=300, chunk=300, heads=12, kv_heads=12),
        Sequence("clip-quarter-rope", 1200, window=600, sink=300, chunk=300, heads=12, kv_heads=12, rope=(10, 10)),
        Sequence("clip", 32760, window=9360, sink=4680, chunk=4680, heads=12, kv_heads=12),
        Sequence("clip-rope", 32760, window=9360, sink=4680, chunk=4680, heads=12, kv_heads=12, rope=(30, 52)),
        Sequence("llm-1k", 1024, window=256, sink=4, heads=8, kv_heads=2),
        *(Sequence(f"llm-{n >> 10}k", n, window=4096, sink=4) for n in (4096, 8192, 16384, 32768)),
        Latent("clip-latent"),
        Latent("clip-latent-mask", masked=True),
    )
}
CPU_LAYERS = 2


def on_cpu(case: Case) -> Case:
    """The case with as many layers as a CPU has time for."""
    return replace(case, layers=min(case.layers, CPU_LAYERS)) if isinstance(case, Stream) else case
