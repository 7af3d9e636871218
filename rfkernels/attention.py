"""The attention functions: check, choose a backend, call the op."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, checks
from .cache import CacheLayer
from .contexts import Context
from .contract import ops
from .contract.geometry import WindowMask
from .contract.requests import ChunkAttention, Past, StreamingAttention, WindowAttention
from .rope import Rope3D

Result = Any  # out, or with return_lse the pair (out, lse): no type says that without writing every argument list thrice


def streaming_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: CacheLayer,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Result:
    """One pass over the open chunk: writes its K and V into the cache and attends to all valid sink and window frames.

    May run any number of times per chunk; a later pass replaces what an earlier one wrote. Where a gradient is wanted
    this is `chunk_attention` on the frozen past plus a write of the detached K and V.

    Args:
        q: ``[B, F * T, H_q, D]``, un-rotated (as given if the cache has no rope). H_kv divides H_q.
        k, v: ``[B, F * T, H_kv, D]``, un-rotated; any floating dtypes, cast to the cache's.
        layer: ``cache[i]``.
        scale: of the scores, default ``D ** -0.5``.
        backend: for this call; default as in `use_backend`.

    Returns:
        out like q in v's dtype; with return_lse also the natural-log normaliser, float32 (float64) ``[B, H_q, F * T]``.
        Rows of frames that a young stream does not have are zeros and -inf.

    Raises:
        ValueError: no open chunk, or shapes or devices that do not fit; TypeError: not floating. Nothing is written.

    Source: "Reward Forcing" (arXiv 2512.04678), EMA-Sink; positions relative to the visible frames.
    """
    cache = layer.cache
    cache._check_chunk(q=q, k=k, v=v)
    scale = checks.scale(scale, cache.head_dim)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        result = chunk_attention(q, k, v, layer.context(), scale, return_lse, backend)
        layer.write(k, v, backend)
        return result
    choice = backends.choose("streaming_attention", cache.device, cache.dtype, cache.head_dim, backend)
    full = choice.reads_full and cache.full  # not asked for otherwise: a compiled caller would depend on it
    request = StreamingAttention(q, layer._write_request(k, v), scale, full, return_lse)
    out, lse = ops.streaming_attention(request, choice.backend)
    out = out.to(v.dtype)
    return (out, lse) if return_lse else out


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    context: Context,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Result:
    """`streaming_attention` as a pure function of the chunk and its frozen past: nothing is written.

    Gradients flow to q, k and v (through out and lse), not to the past, to evicted frames or to alpha. Safe under
    activation checkpointing, which runs it twice. Arguments, returns and errors as in `streaming_attention`;
    ``context`` is ``cache[i].context()``.
    """
    past, geometry = context.past, context.geometry
    sizes = (context.batch_size, context.frames * geometry.frame_tokens, context.num_kv_heads, context.head_dim)
    checks.chunk(sizes, context.device, {"q": q, "k": k, "v": v})
    scale = checks.scale(scale, context.head_dim)
    kind = (context.device, context.dtype, context.head_dim, backend)
    choice = backends.choose("chunk_attention", *kind)
    backward = backends.choose("chunk_attention_backward", *kind)
    full = (choice.reads_full or backward.reads_full) and past.full
    request = ChunkAttention(q, k, v, Past(past.k, past.v, past.num_frames, full), context.rope, geometry, scale)
    out, lse = ops.chunk_attention(request, choice.backend, backward.backend)
    out = out.to(v.dtype)
    return (out, lse) if return_lse else out


def sink_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_tokens: int,
    window_tokens: int,
    chunk_tokens: int = 1,
    first_chunk_tokens: int | None = None,
    own_chunk: bool = True,
    rope: Rope3D | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Result:
    """Attention of whole sequences (training, prefill, language models) to sinks and a sliding window.

    Query i (counted from the first key: ``i = N_k - N_q + row``) lies in a chunk that ends at ``end`` and sees j iff
    ``j < end and (j >= end - window_tokens or j < sink_tokens)``. ``chunk_tokens = 1`` is token-causal sliding-window
    attention with sinks (StreamingLLM). Differentiable in q, k and v, through out and lse.

    Args:
        q: ``[B, N_q, H_q, D]``; k, v: ``[B, N_k, H_kv, D]``; N_q <= N_k, H_kv divides H_q. Any floating dtypes; scores
            are computed with q and k rounded to v's.
        sink_tokens: >= 0, window_tokens: >= 1, chunk_tokens: >= 1.
        first_chunk_tokens: >= 1, if the first chunk has another length.
        own_chunk: False hides the query's own chunk (the clean-context half of teacher forcing, to be joined by
            `merge_attention`). A query that sees nothing gets zeros and lse = -inf.
        rope: None uses q and k as given. With a `Rope3D` they are un-rotated, sinks sit right before each query's
            window, and the token counts must be whole frames: the same as streaming with alpha = 1.
        scale: of the scores, default ``D ** -0.5``.
        backend: for this call; default as in `use_backend`.

    Returns:
        out like q in v's dtype; with return_lse also the natural-log normaliser, float32 (float64) ``[B, H_q, N_q]``.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, 4, q.device if name != "q" else None)
    batch, queries, _, head_dim = q.shape
    checks.shape("k", k, batch=batch, tokens=None, heads=None, head_dim=head_dim)
    checks.shape("v", v, batch=batch, tokens=k.shape[1], heads=k.shape[2], head_dim=head_dim)
    checks.heads(q, k.shape[2])
    if queries > k.shape[1]:
        raise ValueError(f"q must have at most as many tokens as k, {k.shape[1]}, got {queries}")
    first_chunk_tokens = chunk_tokens if first_chunk_tokens is None else first_chunk_tokens
    counts = {
        "sink_tokens": checks.integer("sink_tokens", sink_tokens, 0),
        "window_tokens": checks.integer("window_tokens", window_tokens, 1),
        "chunk_tokens": checks.integer("chunk_tokens", chunk_tokens, 1),
        "first_chunk_tokens": checks.integer("first_chunk_tokens", first_chunk_tokens, 1),
    }
    checks.rope(rope, head_dim)
    tables = None
    if rope is not None:
        for name, count in counts.items():
            if count % (rope.frame_tokens or 1):
                raise ValueError(f"{name} must be whole frames of {rope.frame_tokens} tokens with a rope, got {count}")
        tables = rope.tables(q.device, v.dtype)
    kind = (q.device, v.dtype, head_dim, backend)
    choice = backends.choose("sink_window_attention", *kind)
    backward = backends.choose("sink_window_attention_backward", *kind)
    mask = WindowMask(**counts, own_chunk=bool(own_chunk))
    request = WindowAttention(q, k, v, mask, tables, checks.scale(scale, head_dim))
    out, lse = ops.sink_window_attention(request, choice.backend, backward.backend)
    return (out, lse) if return_lse else out


def merge_attention(
    out1: torch.Tensor, lse1: torch.Tensor, out2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the outputs and normalisers over each.

    Args:
        out1, out2: ``[B, N, H, D]``; lse1, lse2: natural-log normalisers ``[B, H, N]``. Differentiable in all four.

    Returns:
        out in out1's dtype, and lse. Rows that see nothing in either stay zeros and -inf.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    checks.tensor("out1", out1, 4)
    checks.tensor("out2", out2, 4, out1.device)
    batch, tokens, heads, head_dim = out1.shape
    checks.shape("out2", out2, batch=batch, tokens=tokens, heads=heads, head_dim=head_dim)
    for name, lse in (("lse1", lse1), ("lse2", lse2)):
        checks.tensor(name, lse, 3, out1.device)
        checks.shape(name, lse, batch=batch, heads=heads, tokens=tokens)
    return torch.ops.rfkernels.merge_attention(out1, lse1, out2, lse2)
