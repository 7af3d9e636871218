"""The calls whose kernels are compiled without a GPU: every operation on meta tensors, in shapes that reach every form.

A kernel is compiled anew for every value of its constexprs, so the paper's shape alone would leave most forms out:
keys that programs share, query tiles over many frames, the other pairing, grouped heads, a chunk that does not see
itself, a rope without spatial axes, static or rounded sinks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from rfkernels import Rope3D
from rfkernels.backends import triton as backend
from rfkernels.contract.geometry import CacheGeometry, WindowMask
from rfkernels.contract.requests import (
    BeginChunk,
    CacheTensors,
    ChunkAttention,
    ChunkGradients,
    Cotangents,
    Past,
    ReDMD,
    StreamingAttention,
    WindowAttention,
    WindowGradients,
    Write,
)

Calls = dict[str, Callable[[], object]]


class Shape(NamedTuple):
    """Rows and columns of tokens in a frame (none: one token); heads; frames of sink, window and chunk."""

    size: tuple[int, int] | None
    heads: int
    kv_heads: int
    sinks: int
    window: int
    frames: int
    pairing: str = "interleaved"
    own_chunk: bool = True

    @property
    def tokens(self) -> int:
        return 1 if self.size is None else self.size[0] * self.size[1]


PAPER = Shape((30, 52), 12, 12, 3, 6, 3)
SHAPES = {
    "shared": Shape((8, 16), 1, 1, 3, 6, 1, "half"),  # few programs, which share the keys
    "short": Shape((3, 5), 16, 8, 3, 6, 3, "half", own_chunk=False),  # a tile of queries lies in many frames
    "tokens": Shape(None, 16, 4, 4, 4096, 64, "half"),  # every pair turns with the token, as in language models
}


def attention(dtype: torch.dtype, head_dim: int, shape: Shape, queries: int) -> Calls:
    """Streams, chunks and windows, the last two with their backward, of one shape and as many frames of queries."""
    pairing = {"pairing": shape.pairing}
    rope = Rope3D(head_dim, **pairing) if shape.size is None else Rope3D(head_dim, *shape.size, **pairing)
    tokens, capacity, scale = shape.tokens, shape.sinks + shape.window, head_dim**-0.5
    tables = rope.tables("meta", dtype, tokens)
    geometry = CacheGeometry(shape.sinks, shape.window, tokens)
    sizes = (frames * tokens for frames in (shape.sinks, shape.window, shape.frames, shape.frames))
    mask = WindowMask(*sizes, shape.own_chunk)

    def meta(*size: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device="meta")

    def rows(frames: int, heads: int) -> torch.Tensor:
        return meta(1, frames * tokens, heads, head_dim)

    def normaliser(frames: int) -> torch.Tensor:
        return meta(1, shape.heads, frames * tokens, dtype=torch.float32)

    held = meta(1, shape.kv_heads, capacity * tokens, head_dim).transpose(1, 2)
    sums = meta(1, shape.kv_heads, shape.sinks * tokens, head_dim, dtype=torch.float32).transpose(1, 2)
    lengths = meta(1, dtype=torch.int64)
    q, own, lse = rows(shape.frames, shape.heads), rows(shape.frames, shape.kv_heads), normaliser(shape.frames)
    before = rows(capacity - shape.frames, shape.kv_heads)
    long_q, keys, long_lse = rows(queries, shape.heads), rows(capacity, shape.kv_heads), normaliser(queries)

    write = Write(CacheTensors(held, held, sums, sums), lengths, own, own, tables, geometry)
    stream = StreamingAttention(q, write, scale, False, False)
    chunk = ChunkAttention(q, own, own, Past(before, before, lengths, True), tables, geometry, scale)
    rotated, plain = (WindowAttention(long_q, keys, keys, mask, rope, scale) for rope in (tables, None))
    back, long_back = Cotangents(q, lse, q, lse), Cotangents(long_q, long_lse, long_q, long_lse)
    return {
        "streaming": lambda: backend.streaming_attention(stream),
        "chunk": lambda: backend.chunk_attention(chunk),
        "chunk backward": lambda: backend.chunk_attention_backward(ChunkGradients(back, chunk)),
        "window, rope": lambda: backend.sink_window_attention(rotated),
        "window": lambda: backend.sink_window_attention(plain),
        "window backward, rope": lambda: backend.sink_window_attention_backward(WindowGradients(long_back, rotated)),
        "window backward": lambda: backend.sink_window_attention_backward(WindowGradients(long_back, plain)),
    }


def begin_chunk(
    dtype: torch.dtype,
    head_dim: int,
    shape: Shape = PAPER,
    sums: torch.dtype = torch.float32,
    before_window: bool = True,
    static: bool = False,
) -> Callable[[], object]:
    """sums: dtype of the accumulators; static: nothing is fused, and the sink's keys are turned again."""
    tables = Rope3D(head_dim, *shape.size, pairing=shape.pairing).tables("meta", dtype, shape.tokens)
    geometry = CacheGeometry(shape.sinks, shape.window, shape.tokens)

    def meta(frames: int, dtype: torch.dtype) -> torch.Tensor:
        held = torch.empty(1, 1, shape.kv_heads, frames * shape.tokens, head_dim, dtype=dtype, device="meta")
        return held.transpose(2, 3)

    held, sink = meta(geometry.capacity, dtype), meta(shape.sinks, sums)
    lengths = torch.empty(1, dtype=torch.int64, device="meta")
    decay = None if static else torch.empty(2, shape.kv_heads, device="meta")
    advancing = None if shape is PAPER else lengths.to(torch.bool)
    cache = CacheTensors(held, held, sink, None if static else sink)
    request = BeginChunk(cache, lengths, shape.frames, advancing, decay, tables, geometry, before_window)
    return lambda: backend.begin_chunk(request)


def loss(dtype: torch.dtype, masked: bool) -> Callable[[], object]:
    """masked: by elements, and with guidance of the fake score too."""
    latent = torch.empty(1, 21, 16, 60, 104, dtype=dtype, device="meta")
    weight, mask = torch.empty(1, device="meta"), latent.to(torch.bool) if masked else None
    unguided = latent if masked else None
    request = ReDMD(latent, latent, latent, latent, unguided, weight, mask, 3.0, 1.0, True)
    return lambda: backend.redmd_loss(request)


def calls(dtype: torch.dtype, head_dim: int) -> Calls:
    """Every operation at the paper's shape, and one pass whose programs share keys."""
    shared = SHAPES["shared"]
    return {
        "begin_chunk": begin_chunk(dtype, head_dim),
        **attention(dtype, head_dim, PAPER, queries=PAPER.sinks + PAPER.window),
        "streaming, shared": attention(dtype, head_dim, shared, queries=shared.frames)["streaming"],
        "loss": loss(dtype, masked=False),
    }


def forms(dtype: torch.dtype, head_dim: int) -> Calls:
    """The forms of kernels that `calls` leaves out."""
    found = {
        "begin_chunk, rounded": begin_chunk(dtype, head_dim, SHAPES["short"], sums=dtype, before_window=False),
        "begin_chunk, static": begin_chunk(dtype, head_dim, SHAPES["shared"], sums=dtype, static=True),
        "loss, masked": loss(dtype, masked=True),
    }
    for name, shape in SHAPES.items():
        for case, call in attention(dtype, head_dim, shape, queries=shape.frames).items():
            shares = "shared" in name
            # Sharing concerns the forward's keys; without a rope, nothing but that differs from the paper's shape.
            if "backward" not in case if shares else "window" not in case or "rope" in case:
                found[f"{case}, {name}"] = call
    return found
