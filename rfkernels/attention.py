"""The attention functions: check, choose a backend, call the op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import backends, checks, transforms
from .cache import CacheLayer
from .contexts import Context
from .contract import ops
from .contract.geometry import WindowMask
from .contract.requests import ChunkAttention, Past, StreamingAttention, WindowAttention, accumulate_dtype
from .rope import Rope3D

Result = Any  # out, or with return_lse (out, lse): no type says that without writing every argument list three times


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
    if not isinstance(layer, CacheLayer):
        raise TypeError(f"layer must be a layer of a cache, cache[i], got {type(layer).__name__}")
    cache = layer.cache
    cache._check_chunk(q=q, k=k, v=v)
    checks.not_in_backward("streaming_attention")
    scale = checks.scale(scale, cache.head_dim)
    transformed = transforms.active(q, k, v)
    if transformed and transforms.in_func():
        raise RuntimeError("streaming_attention writes into a cache: within torch.func use chunk_attention")
    if transformed or (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        result = chunk_attention(q, k, v, layer.context(), scale, return_lse, backend)
        layer.write(k, v, backend)
        return result
    cache._written = True
    choice = backends.choose("streaming_attention", cache.device, cache.dtype, cache.head_dim, backend)
    full = choice.reads_full and cache.full  # not asked for otherwise: a compiled caller would depend on it
    request = StreamingAttention(q, layer._write_request(k, v), scale, full, return_lse)
    if ops.unobserved(q, k, v, cache.k):
        out, lse = ops.streaming_body(backends.module(choice.backend).streaming_attention, request)
    else:
        out, lse = ops.streaming_attention(request, choice.backend)
    if out.dtype != v.dtype:
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
    activation checkpointing, which runs it twice.

    Args:
        q: ``[B, F * T, H_q, D]``, un-rotated (as given if the cache has no rope). H_kv divides H_q.
        k, v: ``[B, F * T, H_kv, D]``, un-rotated; any floating dtypes.
        context: ``cache[i].context()``, the past of the open chunk.
        scale: of the scores, default ``D ** -0.5``.
        backend: for this call; default as in `use_backend`.

    Returns:
        out like q in v's dtype; with return_lse also the natural-log normaliser, float32 (float64) ``[B, H_q, F * T]``.

    Raises:
        ValueError: shapes or devices that do not fit; TypeError: not floating.

    Source: as `streaming_attention`.
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
    if transforms.active(q, k, v):
        out, lse = transforms.run("chunk_attention", request, choice.backend, q.device)
    else:
        out, lse = ops.chunk_attention(request, choice.backend, backward.backend)
    out = out.to(v.dtype)
    return (out, lse) if return_lse else out


def sink_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    sink_tokens: int,
    window_tokens: int | None,
    chunk_tokens: int | Sequence[int] = 1,
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
        q: ``[B, N_q, H_q, D]``, N_q <= N_k, H_kv divides H_q.
        k, v: ``[B, N_k, H_kv, D]``. Any floating dtypes; scores are computed with q and k rounded to v's.
        sink_tokens: >= 0.
        window_tokens: >= 1, the query's own chunk included, or None for no limit.
        chunk_tokens: >= 1, or the length of every chunk, which add up to N_k (a call for each; any partition).
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

    Source: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453) for sinks beside a window;
    chunks and positions as in "Reward Forcing" (arXiv 2512.04678).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, 4, q.device if name != "q" else None)
    batch, queries, _, head_dim = q.shape
    checks.shape("k", k, batch=batch, tokens=None, heads=None, head_dim=head_dim)
    checks.shape("v", v, batch=batch, tokens=k.shape[1], heads=k.shape[2], head_dim=head_dim)
    if isinstance(chunk_tokens, Sequence):
        lengths = _chunk_lengths(chunk_tokens, first_chunk_tokens, k.shape[1], queries)
        options = dict(sink_tokens=sink_tokens, window_tokens=window_tokens, own_chunk=own_chunk, rope=rope)
        result = _chunk_by_chunk(q, k, v, lengths, options | dict(scale=scale, backend=backend))
        return result if return_lse else result[0]
    checks.heads(q, k.shape[2])
    if queries > k.shape[1]:
        raise ValueError(
            f"q must have at most as many tokens as k, {k.shape[1]}, got {queries} (dense_attention takes any number)"
        )
    checks.rope(rope, head_dim)
    mask = _window_mask(k.shape[1], sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, own_chunk, rope)
    tables = None if rope is None else rope.tables(q.device, v.dtype)
    request = WindowAttention(q, k, v, mask, tables, checks.scale(scale, head_dim))
    kind = (q.device, v.dtype, head_dim, backend)
    choice = backends.choose("sink_window_attention", *kind)
    backward = backends.choose("sink_window_attention_backward", *kind)
    if transforms.active(q, k, v):
        out, lse = transforms.run("sink_window_attention", request, choice.backend, q.device)
    else:
        out, lse = ops.sink_window_attention(request, choice.backend, backward.backend)
    return (out, lse) if return_lse else out


def _chunk_lengths(lengths: Sequence[int], first: int | None, keys: int, queries: int) -> list[int]:
    checked = [checks.integer("chunk_tokens", length, 1) for length in lengths]
    if first is not None:
        raise ValueError(f"first_chunk_tokens must be None where every chunk's length is given, got {first}")
    if sum(checked) != keys or queries > keys:
        raise ValueError(
            f"chunk_tokens must add up to the {keys} tokens of k, of which q has the last, got {sum(checked)} and "
            f"{queries} queries"
        )
    return checked


def _chunk_by_chunk(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A call for each chunk, on the keys up to its end: for its queries what is before it is one first chunk."""
    outs, lses, begin, first_query = [], [], 0, k.shape[1] - q.shape[1]
    for length in lengths:
        end = begin + length
        rows = q[:, max(begin - first_query, 0) : max(end - first_query, 0)]
        if rows.shape[1]:
            out, lse = sink_window_attention(
                rows, k[:, :end], v[:, :end], chunk_tokens=length, first_chunk_tokens=begin or length,
                return_lse=True, **options,
            )  # fmt: skip
            outs.append(out)
            lses.append(lse)
        begin = end
    if not outs:
        return q.new_zeros(q.shape, dtype=v.dtype), q.new_zeros(len(q), q.shape[2], 0, dtype=accumulate_dtype(v.dtype))
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _window_mask(
    keys: int, sinks: int, window: int | None, chunk: int, first: int | None, own_chunk: bool, rope: Rope3D | None
) -> WindowMask:
    """The checked mask, in numbers that 32 bits hold: a window larger than everything is one that hides nothing."""
    unlimited = window is None
    counts = {
        "sink_tokens": checks.integer("sink_tokens", sinks, 0),
        "chunk_tokens": checks.integer("chunk_tokens", chunk, 1),
        "first_chunk_tokens": checks.integer("first_chunk_tokens", chunk if first is None else first, 1),
    }
    if window is not None:
        counts["window_tokens"] = checks.integer("window_tokens", window, 1)
    tokens = 1 if rope is None else rope.frame_tokens or 1
    for name, count in counts.items():
        if count % tokens:
            raise ValueError(f"{name} must be whole frames of {tokens} tokens with a rope, got {count}")
    ends = keys + counts["chunk_tokens"] + counts["first_chunk_tokens"]  # no chunk ends later
    if window is not None and not isinstance(window, torch.SymInt) and window >= ends:
        unlimited = True
    if unlimited:
        # Every earlier key is in the window, and nothing is evicted: neither sinks nor what lies beyond the last key
        # make a difference.
        if isinstance(counts["chunk_tokens"], int) and isinstance(keys, int):
            counts["chunk_tokens"] = min(counts["chunk_tokens"], max(1, keys))
            counts["first_chunk_tokens"] = min(counts["first_chunk_tokens"], max(1, keys))
        counts["window_tokens"] = keys + counts["chunk_tokens"] + counts["first_chunk_tokens"]
        counts["sink_tokens"] = 0
    elif isinstance(keys, int):
        counts["sink_tokens"] = min(counts["sink_tokens"], ends)
    for name, count in counts.items():
        if isinstance(count, int) and count >= 2**31:
            raise ValueError(f"{name} must be below 2**31, got {count}")
    return WindowMask(
        counts["sink_tokens"], counts["window_tokens"], counts["chunk_tokens"], counts["first_chunk_tokens"],
        bool(own_chunk),
    )  # fmt: skip


def dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Result:
    """Attention of every query to every key, any number of each: reference images, the steps of a ring.

    With `merge_attention` it extends another result by further keys. Differentiable in q, k and v, through out and lse.

    Args:
        q: ``[B, N_q, H_q, D]``, H_kv divides H_q.
        k, v: ``[B, N_k, H_kv, D]``. Any floating dtypes, used as given (not rotated).
        scale, backend: as in `sink_window_attention`.

    Returns:
        out like q in v's dtype; with return_lse also the natural-log normaliser, float32 (float64) ``[B, H_q, N_q]``.
        Without keys zeros and -inf.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        checks.tensor(name, x, 4, q.device if name != "q" else None)
    batch, queries, heads, head_dim = q.shape
    checks.shape("k", k, batch=batch, tokens=None, heads=None, head_dim=head_dim)
    keys, kv_heads = k.shape[1:3]
    checks.heads(q, kv_heads)

    def attend(queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return sink_window_attention(
            queries, k, v, sink_tokens=0, window_tokens=None, chunk_tokens=max(1, keys), scale=scale, return_lse=True,
            backend=backend,
        )  # fmt: skip

    if queries <= keys or keys == 0:
        if keys == 0:
            out = q.new_zeros(q.shape, dtype=v.dtype)
            lse = q.new_full((batch, heads, queries), -torch.inf, dtype=accumulate_dtype(v.dtype))
        else:
            out, lse = attend(q)
        return (out, lse) if return_lse else out
    # More queries than keys: the surplus as further heads of each group, which see the same keys.
    fold = -(-queries // keys)
    padded = torch.nn.functional.pad(q, (0, 0, 0, 0, 0, fold * keys - queries))
    folded = padded.unflatten(1, (fold, keys)).unflatten(3, (kv_heads, -1))  # [B, fold, N_k, H_kv, G, D]
    out, lse = attend(folded.permute(0, 2, 3, 1, 4, 5).flatten(2, 4))
    out = out.unflatten(2, (kv_heads, fold, -1)).permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(1, 2)[:, :queries]
    lse = lse.unflatten(1, (kv_heads, fold, -1)).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)[..., :queries]
    return (out, lse) if return_lse else out


def merge_attention(
    out1: torch.Tensor, lse1: torch.Tensor, out2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the outputs and normalisers over each.

    Args:
        out1, out2: ``[B, N, H, D]``, floating.
        lse1, lse2: natural-log normalisers ``[B, H, N]``. Differentiable in all four.

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
    return ops.merge_attention(out1, lse1, out2, lse2)
