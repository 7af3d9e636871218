"""Attention by torch's scaled_dot_product_attention over the cache's contiguous prefix.

On the CPU that kernel runs near the machine's matrix rate, lengths are read from CPU tensors and cache updates are
compiled loops. On other devices nothing is read back: until the cache is full the whole buffer (zeros where nothing
has been written) is attended under a mask, and cache updates are torch operations, few of them (`cache`, `tables`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from ... import native
from ...contract import namespaces
from ...contract.geometry import CacheGeometry, WindowMask
from ...contract.requests import (
    BeginChunk,
    ChunkAttention,
    ChunkGradients,
    MergeAttention,
    Past,
    ReDMD,
    RopeTables,
    Rotate,
    StreamingAttention,
    WindowAttention,
    WindowGradients,
    Write,
    accumulate_dtype,
    open_frames,
)
from ...contract.schemas import flattener
from .. import reference
from ..layout import unit_rows
from . import cache as updates
from . import dense, tables
from .rotation import turn_of, turned

_native = namespaces.native
_flat_begin_chunk, _flat_write, _flat_rotate = flattener(BeginChunk), flattener(Write), flattener(Rotate)
_flat_streaming, _flat_loss = flattener(StreamingAttention), flattener(ReDMD)
_MASKED_QUERIES = 128  # queries a masked block holds: a mask this tall costs little beside its scores


def unavailable(device: torch.device) -> str | None:
    return None


def unsupported(operation: str, dtype: torch.dtype, head_dim: int | None) -> str | None:
    return None


def reads_full(device: torch.device) -> bool:
    """Whether attention on ``device`` profits from the host's knowledge that every stream has filled its window."""
    return device.type != "cpu"


# --- the cache --------------------------------------------------------------------------------------------------------


def begin_chunk(request: BeginChunk) -> None:
    if not native.serves(request.cache.k):
        return updates.begin_chunk(request)
    _native.begin_chunk(*_flat_begin_chunk(request))


def write(request: Write) -> None:
    if native.serves(request.cache.k):
        _native.write(*_flat_write(_readable(request)))
    else:
        updates.write(request)


def prepare_chunk(
    num_frames: torch.Tensor,
    after: Callable[[], torch.Tensor],
    frames: int,
    rope: RopeTables | None,
    geometry: CacheGeometry,
    chosen: bool,
) -> Callable[[], None] | None:
    """Computes what the passes over a chunk share, where torch's operations serve them.

    after: what num_frames will be. chosen: this backend is the one of its passes. Where it was for an earlier chunk, a
    captured graph may rely on it. Returns what to call once the chunk is open.
    """
    if (native.serves(num_frames) and dense.has_flash()) or not (chosen or tables.prepared(num_frames, frames)):
        return None
    return tables.prepare_chunk(num_frames, after(), frames, rope, geometry)


def _readable(request: Write) -> Write:
    if request.new_k.stride(-1) == request.new_v.stride(-1) == 1:
        return request  # as nearly always; making it anew would cost a microsecond
    return request._replace(new_k=unit_rows(request.new_k), new_v=unit_rows(request.new_v))


def rotate(
    x: torch.Tensor,
    frames: torch.Tensor,
    rope: RopeTables | None,
    *,
    first_token: int = 0,
    inverse: bool = False,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`reference.rotate`, compiled where that is possible."""
    if rope is None:
        return reference.store(x, dtype)
    if not native.serves(x):
        return turned(x, turn_of(frames, rope, x.shape[1], first_token=first_token, inverse=inverse), dtype)
    return _native.rotate(*_flat_rotate(Rotate(unit_rows(x), frames, first_token, rope, inverse, dtype)))


def redmd_loss(request: ReDMD) -> tuple[torch.Tensor, torch.Tensor]:
    if not native.serves(request.x):
        return reference.redmd_loss(request)
    contiguous = (x.contiguous() if isinstance(x, torch.Tensor) else x for x in request)
    return _native.redmd_loss(*_flat_loss(ReDMD._make(contiguous)))


# --- the open chunk ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Streams:
    """Samples of one age: which, their first existing token of the chunk, and their visible frames."""

    samples: slice
    missing_tokens: int
    valid_frames: int


def _same_age(num_frames: torch.Tensor, frames: int, geometry: CacheGeometry) -> list[_Streams]:
    """Reads the lengths of a CPU cache: one group where all streams are of one age, else one for each stream."""
    ages = num_frames.tolist()
    slices = [slice(0, len(ages))] if len(set(ages)) == 1 else [slice(b, b + 1) for b in range(len(ages))]
    return [
        _Streams(s, max(0, frames - ages[s.start]) * geometry.frame_tokens, geometry.valid_frames(ages[s.start]))
        for s in slices
    ]


def streaming_attention(request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
    q, scale = request.q, request.scale
    cache, num_frames, geometry = request.write.cache, request.write.num_frames, request.write.geometry
    k, v = cache.k, cache.v
    if native.serves(k) and dense.has_flash():
        write_request = _readable(request.write)
        if write_request is not request.write or q.stride(-1) != 1:
            request = request._replace(q=unit_rows(q), write=write_request)
        return _native.streaming_attention(*_flat_streaming(request))
    q, frames = _write_and_turn(request)
    if not dense.on_cpu(k):
        return _attend_masked(request, q, frames)
    groups = _same_age(num_frames, frames.shape[1], geometry)
    if len(groups) == 1 and groups[0].missing_tokens == 0:
        tokens = groups[0].valid_frames * geometry.frame_tokens
        return dense.attend(q, k[:, :tokens], v[:, :tokens], scale)
    out, lse = _empty_rows(q)
    for group in groups:
        rows, tokens = slice(group.missing_tokens, None), group.valid_frames * geometry.frame_tokens
        parts = (q[group.samples, rows], k[group.samples, :tokens], v[group.samples, :tokens])
        out[group.samples, rows], lse[group.samples, :, rows] = dense.attend(*parts, scale)
    return out, lse


def _write_and_turn(request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries, rotated, and the open frames ``[B, F]``, once keys and values have been written."""
    q, (cache, num_frames, _, _, rope, geometry) = request.q, request.write
    count, dtype = q.shape[1] // geometry.frame_tokens, cache.k.dtype
    if native.serves(cache.k):
        write(request.write)
        frames = open_frames(num_frames, count)
        return rotate(q, frames, rope, dtype=dtype), frames
    return updates.write_and_turn(request.write, q, ring_only=request.full and count <= geometry.window_frames)


def _attend_masked(
    request: StreamingAttention, q: torch.Tensor, frames: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Without reading a length: the whole buffer, under a mask until every stream has filled it. q: rotated.

    Masked entries are zeros for that long: a mask lets NaN through, and they may hold anything.
    """
    k, v, geometry = request.write.cache.k, request.write.cache.v, request.write.geometry
    if request.full:
        return dense.attend(q, k, v, request.scale, return_lse=request.return_lse)
    keys = torch.arange(k.shape[1], device=k.device)
    seen = keys < geometry.valid_frames(request.write.num_frames)[:, None] * geometry.frame_tokens
    k, v = (torch.where(seen[:, :, None, None], x, 0) for x in (k, v))
    out, lse = dense.attend(q, k, v, request.scale, seen[:, None], request.return_lse)
    present = (frames >= 0).repeat_interleave(geometry.frame_tokens, 1)
    out = torch.where(present[:, :, None, None], out, 0)
    return out, torch.where(present[:, None], lse, -torch.inf) if request.return_lse else lse


def _empty_rows(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    lse = q.new_full((len(q), q.shape[2], q.shape[1]), -torch.inf, dtype=accumulate_dtype(q.dtype))
    return torch.zeros_like(q, memory_format=torch.contiguous_format), lse


@dataclass(frozen=True)
class _ChunkPart:
    """Rows of one group of streams with the keys they see, the chunk's own first."""

    samples: slice
    rows: slice
    k: torch.Tensor
    v: torch.Tensor
    visible: torch.Tensor | None


def _chunk_parts(k: torch.Tensor, v: torch.Tensor, past: Past, geometry: CacheGeometry) -> Iterator[_ChunkPart]:
    """k (rotated) and v: the chunk's own. Past frames are joined to them for as long as the call lasts."""
    frames = k.shape[1] // geometry.frame_tokens
    if dense.on_cpu(k):
        for group in _same_age(past.num_frames, frames, geometry):
            rows = slice(group.missing_tokens, None)
            count = max(0, group.valid_frames - frames) * geometry.frame_tokens
            at = group.samples
            joined_k, joined_v = (torch.cat([x[at, rows], old[at, :count]], 1) for x, old in ((k, past.k), (v, past.v)))
            yield _ChunkPart(at, rows, joined_k, joined_v, None)
        return
    visible = None
    if not past.full:
        present = (open_frames(past.num_frames, frames) >= 0).repeat_interleave(geometry.frame_tokens, 1)
        valid = (geometry.valid_frames(past.num_frames) - frames).clamp(min=0) * geometry.frame_tokens
        old = torch.arange(past.k.shape[1], device=k.device) < valid[:, None]
        visible = present[:, :, None] & torch.cat([present, old], 1)[:, None, :]
    yield _ChunkPart(slice(None), slice(None), torch.cat([k, past.k], 1), torch.cat([v, past.v], 1), visible)


def chunk_attention(request: ChunkAttention) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, past, rope, geometry, scale = request
    dtype, frames = past.k.dtype, open_frames(past.num_frames, q.shape[1] // geometry.frame_tokens)
    q, k = (rotate(x, frames, rope, dtype=dtype) for x in (q, k))
    out, lse = _empty_rows(q)
    for part in _chunk_parts(k, reference.store(v, dtype), past, geometry):
        queries = q[part.samples, part.rows]
        out[part.samples, part.rows], lse[part.samples, :, part.rows] = dense.attend(
            queries, part.k, part.v, scale, part.visible
        )
    return out, lse


def chunk_attention_backward(request: ChunkGradients) -> tuple[torch.Tensor, ...]:
    grad_out, grad_lse, out, lse = request.cotangents
    q, k, v, past, rope, geometry, scale = request.forward
    dtype, frames = past.k.dtype, open_frames(past.num_frames, q.shape[1] // geometry.frame_tokens)
    precision = accumulate_dtype(dtype)
    rotated_q, rotated_k = (rotate(x, frames, rope, dtype=dtype) for x in (q, k))
    grads = [torch.zeros(x.shape, dtype=precision, device=x.device) for x in (q, k, v)]
    for part in _chunk_parts(rotated_k, reference.store(v, dtype), past, geometry):
        at, rows = part.samples, part.rows
        own = k[at, rows].shape[1]
        shares = dense.backward(
            grad_out[at, rows], grad_lse[at, :, rows], rotated_q[at, rows], part.k, part.v, out[at, rows],
            lse[at, :, rows], scale, part.visible, own,
        )  # fmt: skip
        for grad, share in zip(grads, shares, strict=True):
            grad[at, rows] = share
    grad_q, grad_k = (
        rotate(grad, frames, rope, inverse=True, dtype=x.dtype) for grad, x in zip(grads, (q, k), strict=False)
    )
    return grad_q, grad_k, grads[2].to(v.dtype)


# --- full sequences ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _WindowPart:
    """Queries ``rows`` (of the given ones) and the keys of their window, or of the sinks outside it."""

    rows: slice
    keys: slice
    visible: torch.Tensor | None
    sink: bool


def _window_blocks(mask: WindowMask, queries: int, keys: int, device: torch.device) -> Iterator[list[_WindowPart]]:
    """Blocks of queries, whole chunks each; a block of one chunk needs no mask. No N x N mask anywhere."""
    first, start = keys - queries, 0
    while start < queries:
        stop = mask.chunk_end(first + start)
        while mask.chunk_end(stop) - (first + start) <= _MASKED_QUERIES:
            stop = mask.chunk_end(stop)
        stop = min(stop - first, queries)
        yield _window_parts(mask, slice(start, stop), first, keys, device)
        start = stop


def _window_parts(mask: WindowMask, rows: slice, first: int, keys: int, device: torch.device) -> list[_WindowPart]:
    head, tail = first + rows.start, first + rows.stop - 1  # the block's first and last query
    several = mask.chunk_end(head) != mask.chunk_end(tail)
    i = torch.arange(head, tail + 1, device=device)[:, None]
    limit = min(keys, mask.limit(tail))
    ranges = {
        False: (max(0, mask.chunk_end(head) - mask.window_tokens), limit),
        True: (0, min(mask.sink_tokens, mask.chunk_end(tail) - mask.window_tokens, limit)),
    }
    parts = []
    for sink, (low, high) in ranges.items():
        if low < high:
            j = torch.arange(low, high, device=device)
            outside = j < mask.chunk_end(i) - mask.window_tokens
            visible = mask.visible(i, j) & (outside if sink else ~outside) if several else None
            parts.append(_WindowPart(rows, slice(low, high), None if visible is None else visible[None], sink))
    return parts


def _query_frames(
    mask: WindowMask, tokens: int, queries: int, keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Frame numbers of the queries as window keys meet them and as sinks outside the window do (docs/semantics.md)."""
    i = torch.arange(keys - queries, keys, device=device)[None]
    return i // tokens, i // tokens - mask.evicted_frames(i, tokens)


def _rotate_queries(
    q: torch.Tensor, rope: RopeTables | None, mask: WindowMask, keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    if rope is None:
        return (q.to(dtype),) * 2
    first = (keys - q.shape[1]) % rope.frame_tokens
    at = _query_frames(mask, rope.frame_tokens, q.shape[1], keys, q.device)
    return tuple(rotate(q, frames, rope, first_token=first, dtype=dtype) for frames in at)


def _unrotate_queries(
    grads: tuple[torch.Tensor, torch.Tensor], rope: RopeTables | None, mask: WindowMask, keys: int
) -> torch.Tensor:
    if rope is None:
        return grads[0] + grads[1]
    queries = grads[0].shape[1]
    first = (keys - queries) % rope.frame_tokens
    at = _query_frames(mask, rope.frame_tokens, queries, keys, grads[0].device)
    window, sink = (
        rotate(grad, frames, rope, first_token=first, inverse=True, dtype=grad.dtype)
        for grad, frames in zip(grads, at, strict=True)
    )
    return window + sink


def _rotate_keys(
    k: torch.Tensor, rope: RopeTables | None, *, dtype: torch.dtype, inverse: bool = False
) -> torch.Tensor:
    if rope is None:
        return k.to(dtype)
    frames = torch.arange(k.shape[1], device=k.device)[None] // rope.frame_tokens
    return rotate(k, frames, rope, inverse=inverse, dtype=dtype)


def sink_window_attention(request: WindowAttention) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, mask, rope, scale = request
    keys = k.shape[1]
    q_window, q_sink = _rotate_queries(q, rope, mask, keys, v.dtype)
    k = _rotate_keys(k, rope, dtype=v.dtype)
    out, lse = _empty_rows(q_window)
    for parts in _window_blocks(mask, q.shape[1], keys, q.device):
        merged = None
        for part in parts:
            queries = (q_sink if part.sink else q_window)[:, part.rows]
            result = dense.attend(queries, k[:, part.keys], v[:, part.keys], scale, part.visible)
            merged = result if merged is None else reference.merge_attention(MergeAttention(*merged, *result))
        if merged is not None:
            out[:, parts[0].rows], lse[:, :, parts[0].rows] = merged
    return out, lse


def sink_window_attention_backward(request: WindowGradients) -> tuple[torch.Tensor, ...]:
    grad_out, grad_lse, out, lse = request.cotangents
    q, k, v, mask, rope, scale = request.forward
    keys, precision = k.shape[1], accumulate_dtype(v.dtype)
    q_window, q_sink = _rotate_queries(q, rope, mask, keys, v.dtype)
    rotated_k = _rotate_keys(k, rope, dtype=v.dtype)
    grad_window, grad_sink, grad_k, grad_v = (
        torch.zeros(x.shape, dtype=precision, device=x.device) for x in (q, q, k, v)
    )
    for parts in _window_blocks(mask, q.shape[1], keys, q.device):
        for part in parts:
            at, queries = part.rows, q_sink if part.sink else q_window
            grad_q = grad_sink if part.sink else grad_window
            share_q, share_k, share_v = dense.backward(
                grad_out[:, at], grad_lse[:, :, at], queries[:, at], rotated_k[:, part.keys], v[:, part.keys],
                out[:, at], lse[:, :, at], scale, part.visible,
            )  # fmt: skip
            grad_q[:, at] = share_q
            grad_k[:, part.keys] += share_k
            grad_v[:, part.keys] += share_v
    grad_q = _unrotate_queries((grad_window, grad_sink), rope, mask, keys)
    grad_k = _rotate_keys(grad_k, rope, dtype=k.dtype, inverse=True)
    return grad_q.to(q.dtype), grad_k, grad_v.to(v.dtype)
