"""What a request for attention gives the kernels, and the launches of the forward pass."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...contract.geometry import WindowMask
from ...contract.requests import ChunkAttention, RopeTables, StreamingAttention, WindowAttention
from ..plan import divide_up
from . import tiles
from .cache_kernels import write
from .forward import forward_kernel, merge_kernel
from .launch import (
    ALL_REGISTERS,
    FUSION,
    addressable,
    key_values,
    mask_of,
    on_device,
    padded,
    pointwise_rows,
    rope_of,
    strided,
)
from .rotation import rotate
from .structs import Frames
from .tiles import TileSize


class Prepared(NamedTuple):
    """A request as the kernels take it: keys and values ``[B, N, H_kv, D]`` of one dtype, keys rotated, q not.

    k, v: of the cache, of what was before a chunk, or of full sequences (mask). own_k, own_v: a chunk's own.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    own_k: torch.Tensor | None
    own_v: torch.Tensor | None
    frames: Frames
    mask: WindowMask | None
    rope: RopeTables | None
    scale: float

    @property
    def use(self) -> str:
        if self.mask is not None:
            return "window"
        return "prefix" if self.own_k is None else "chunk"

    @property
    def longest(self) -> int:
        """Keys that one query may see, at most."""
        if self.mask is None:
            return self.k.shape[1] + (0 if self.own_k is None else self.own_k.shape[1])
        return min(self.k.shape[1], self.mask.sink_tokens + self.mask.window_tokens)

    @property
    def first_token(self) -> int:
        """The token of the sequence, or of the chunk, that is row 0 of q."""
        return 0 if self.mask is None else self.k.shape[1] - self.q.shape[1]


def prepare_chunk(request: ChunkAttention) -> Prepared:
    """A chunk's own keys become what the cache would hold."""
    past, rope, geometry = request.past, request.rope, request.geometry
    own_k = rotate(request.k, rope, past.k.dtype, num_frames=past.num_frames)
    own_v = rotate(request.v, None, past.k.dtype)
    frames = Frames(past.num_frames, geometry.frame_tokens, geometry.capacity)
    return Prepared(
        request.q, addressable(past.k), addressable(past.v), own_k, own_v, frames, None, rope, request.scale
    )


def prepare_window(request: WindowAttention) -> Prepared:
    k, v, rope = rotate(request.k, request.rope, request.v.dtype), addressable(request.v), request.rope
    frames = Frames(None, 1 if rope is None else rope.frame_tokens, 0)
    return Prepared(request.q, k, v, None, None, frames, request.mask, rope, request.scale)


def streaming_attention(request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """The pass: one launch that writes, one that attends, and two for tiles whose keys are shared (`backends.plan`)."""
    written = request.write
    write(written)
    geometry = written.geometry
    frames = Frames(written.num_frames, geometry.frame_tokens, geometry.capacity)
    cache = written.cache
    return attend(Prepared(request.q, cache.k, cache.v, None, None, frames, None, written.rope, request.scale))


def chunk_attention(request: ChunkAttention) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(prepare_chunk(request))


def sink_window_attention(request: WindowAttention) -> tuple[torch.Tensor, torch.Tensor]:
    return attend(prepare_window(request))


def attend(prepared: Prepared) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out in k's dtype and lse float32 ``[B, H_q, N_q]``."""
    q, scale = addressable(prepared.q), prepared.scale
    if scale < 0:  # the running maximum needs a positive one
        q, scale = -q, -scale
    dtype = prepared.k.dtype
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    rope, mask, first_token, sink_q = prepared.rope, prepared.mask, prepared.first_token, None
    if rope is not None and mask is not None:  # between the two segments of keys it would cost spilled registers
        sink_q = rotate(q, rope, dtype, first_token=first_token, mask=mask)
    # Where every pair turns with the token, there is an angle for each element: those spill too, and made Triton choose
    # layouts of Q and K that tensor cores cannot load at once.
    if rope is not None and rope.spatial.shape[1] == 0:
        q = rotate(q, rope, dtype, num_frames=prepared.frames.seen, first_token=first_token)
        rope = None
    if q is not prepared.q:  # else neither rope nor scale has changed, and a copy costs the host a microsecond
        prepared = prepared._replace(q=q, rope=rope, scale=scale)
    with on_device(q):
        _launch(prepared, sink_q, out, lse)
    return out, lse


def _launch(prepared: Prepared, sink_q: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor) -> None:
    """sink_q: queries as they meet the sinks outside their window, where that is another rotation."""
    q = prepared.q
    batch, queries, heads, head_dim = q.shape
    arch, block_d = tiles.architecture(), padded(head_dim)
    kind = arch, head_dim, prepared.k.dtype, prepared.use
    tile = tiles.forward_tile(*kind, rope=sink_q is not None, shared=False)
    row_tiles = divide_up(queries, tile.rows) * heads * batch
    whole, shares = tiles.plan(arch, row_tiles, prepared.longest, tile, tiles.processors(q.device))
    if whole > 0:
        _sweep_tiles(arch, prepared, sink_q, out, lse, tile, range(whole), shares=1)
    tail = row_tiles - whole
    if tail == 0:
        return
    tile = tiles.forward_tile(*kind, rope=sink_q is not None, shared=True)  # as many rows
    part_lse = torch.empty(tail, shares, tile.rows, dtype=torch.float32, device=q.device)
    parts = part_lse.new_empty(*part_lse.shape, head_dim)
    _sweep_tiles(arch, prepared, sink_q, parts, part_lse, tile, range(whole, row_tiles), shares)
    merged = min(pointwise_rows(block_d), tile.rows)
    merge_kernel[(tail * (tile.rows // merged),)](
        parts, part_lse, out, lse, queries, heads, whole, SHARES=shares, D=head_dim, BLOCK_D=block_d,
        TILE_M=tile.rows, BLOCK_M=merged, num_warps=4, **FUSION,
    )  # fmt: skip


def _sweep_tiles(
    arch: int | None, prepared: Prepared, sink_q: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor,
    tile: TileSize, row_tiles: range, shares: int,
) -> None:  # fmt: skip
    """One launch of the forward kernel over these tiles of queries, with ``shares`` programs for the keys of each."""
    q, k, v, own_k, own_v, frames, mask, rope, scale = prepared
    queries, heads, head_dim = q.shape[1:]
    block_d = padded(head_dim)
    forward_kernel[(len(row_tiles), shares)](
        strided(q), None if sink_q is None else strided(sink_q), key_values(k, v),
        None if own_k is None or own_v is None else key_values(own_k, own_v), out, lse, frames, rope_of(rope),
        mask_of(mask), scale, queries, k.shape[1], heads, row_tiles.start, GROUP=heads // k.shape[2], D=head_dim,
        BLOCK_D=block_d, BLOCK_M=tile.rows, BLOCK_N=tile.keys, SHARES=shares, STAGES=tile.stages,
        TWO_FRAMES=frames.tokens >= tile.rows, HIDE_JOIN=tiles.hides_joins(arch, tile), num_warps=tile.warps,
        num_stages=tile.stages, **FUSION,
        **(ALL_REGISTERS if k.dtype == torch.float32 or block_d > 128 else {}),
    )  # fmt: skip
