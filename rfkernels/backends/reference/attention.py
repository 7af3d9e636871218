"""Attention as its definition says: all scores, a mask, a softmax."""

from __future__ import annotations

import torch

from ...contract.requests import (
    ChunkAttention,
    MergeAttention,
    StreamingAttention,
    WindowAttention,
    accumulate_dtype,
    open_frames,
)
from .cache import write
from .rotation import rotate, store


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    sink_q: torch.Tensor | None = None,
    sink_region: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of q ``[B, N_q, H_q, D]`` over k, v ``[B, N_k, H_kv, D]``, and its natural-log normaliser.

    visible: bool ``[B or 1, N_q or 1, N_k]`` or None (everything). Where sink_region is set, scores use sink_q, the
    queries in another rotation. Returns out ``[B, N_q, H_q, D]`` and lse ``[B, H_q, N_q]`` in float32 (float64); a
    query that sees nothing gets zeros and -inf. Keys that no query sees may hold anything, NaN too.
    """
    precision, kv_heads = accumulate_dtype(v.dtype), k.shape[2]
    if visible is not None:
        visible = visible.expand(-1, q.shape[1], -1)
        seen = visible.any(1)[:, :, None, None]
        k, v = torch.where(seen, k, 0), torch.where(seen, v, 0)
    k, v = k.to(precision), v.to(precision)

    def scores_of(queries: torch.Tensor) -> torch.Tensor:
        grouped = queries.to(precision).unflatten(2, (kv_heads, -1))
        return torch.einsum("bnhgd,bmhd->bhgnm", grouped, k) * scale

    scores = scores_of(q)
    if sink_q is not None and sink_region is not None:
        scores = torch.where(sink_region, scores_of(sink_q), scores)
    empty = torch.zeros((), dtype=torch.bool, device=q.device)
    if visible is not None:
        visible = visible[:, None, None]
        empty = ~visible.any(-1, keepdim=True)
        scores = scores.masked_fill(~visible & ~empty, -torch.inf)  # an empty row stays finite, for its gradient
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.where(empty, 0.0, (scores - lse).exp())
    out = torch.einsum("bhgnm,bmhd->bnhgd", weights, v).flatten(2, 3).contiguous()
    return out, torch.where(empty, -torch.inf, lse).squeeze(-1).flatten(1, 2)


def streaming_attention(request: StreamingAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes, then the open chunk's queries over the valid prefix: out in the cache's dtype, and lse."""
    write(request.write)
    geometry = request.write.geometry
    k, v, num_frames = request.write.cache.k, request.write.cache.v, request.write.num_frames
    frames = open_frames(num_frames, request.q.shape[1] // geometry.frame_tokens)
    q = rotate(request.q, frames, request.write.rope, dtype=accumulate_dtype(k.dtype))
    keys = torch.arange(k.shape[1], device=k.device)
    seen = keys < geometry.valid_frames(num_frames)[:, None] * geometry.frame_tokens
    present = (frames >= 0).repeat_interleave(geometry.frame_tokens, 1)
    out, lse = dense_attention(q, k, v, present[:, :, None] & seen[:, None, :], request.scale)
    return out.to(k.dtype), lse


def chunk_attention(request: ChunkAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """What `write` and attention over the prefix give for the open chunk, without writing anything."""
    past, geometry, dtype = request.past, request.geometry, request.past.k.dtype
    count = request.q.shape[1] // geometry.frame_tokens
    frames = open_frames(past.num_frames, count)
    q = rotate(request.q, frames, request.rope, dtype=accumulate_dtype(dtype))
    k, v = rotate(request.k, frames, request.rope, dtype=dtype), store(request.v, dtype)
    present = (frames >= 0).repeat_interleave(geometry.frame_tokens, 1)
    valid = (geometry.valid_frames(past.num_frames) - count).clamp(min=0) * geometry.frame_tokens
    seen = torch.cat([torch.arange(past.k.shape[1], device=q.device) < valid[:, None], present], 1)
    k, v = torch.cat([past.k, k], 1), torch.cat([past.v, v], 1)
    out, lse = dense_attention(q, k, v, present[:, :, None] & seen[:, None, :], request.scale)
    return out.to(dtype), lse


def sink_window_attention(request: WindowAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Full-sequence attention under the mask, in v's dtype; with a rope, sinks sit right before each query's window."""
    q, k, v, mask, rope, scale = request
    rows = torch.arange(k.shape[1] - q.shape[1], k.shape[1], device=q.device)[:, None]
    columns = torch.arange(k.shape[1], device=q.device)
    visible = mask.visible(rows, columns)[None]
    sink_q = sink_region = None
    rotated = q
    if rope is not None:
        precision, tokens = rope.spatial.dtype, rope.frame_tokens
        frames, first = (rows // tokens).T, (k.shape[1] - q.shape[1]) % tokens
        evicted = mask.evicted_frames(rows, tokens).T
        rotated = rotate(q, frames, rope, first_token=first, dtype=precision)
        sink_q = rotate(q, frames - evicted, rope, first_token=first, dtype=precision)
        sink_region = columns < mask.chunk_end(rows) - mask.window_tokens
        k = rotate(k, columns[None] // tokens, rope, dtype=precision)
    out, lse = dense_attention(rotated, k, v, visible, scale, sink_q, sink_region)
    return out.to(v.dtype), lse


def merge_attention(request: MergeAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each."""
    out1, lse1, out2, lse2 = request
    empty = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    lse1, lse2 = (torch.where(empty, 0.0, x) for x in (lse1, lse2))  # finite, for the gradient's sake
    lse = torch.logaddexp(lse1, lse2)
    weight1, weight2 = ((part - lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2))
    out = weight1 * out1.to(lse.dtype) + weight2 * out2.to(lse.dtype)
    out = torch.where(empty.transpose(1, 2)[..., None], 0.0, out)
    return out.to(out1.dtype), torch.where(empty, -torch.inf, lse)
