"""The definitions, in plain PyTorch: any device, any floating dtype, differentiable, no value read by the host.

Slow and short on purpose: what a kernel should compute is what this file computes. Shapes: B batch, N tokens, H heads
(H_q query heads, H_kv key heads, H_q = G * H_kv), D head size, T tokens a frame, F frames of the open chunk.
Source: "Reward Forcing" (arXiv 2512.04678), EMA-Sink and Re-DMD; rotating once, when written, is ours.
"""

from __future__ import annotations

import math

import torch

from .arguments import CacheTensors, Past, accumulate_dtype, open_frames
from .geometry import CacheGeometry, WindowMask
from .rope import RopeTables

# --- rotation ---------------------------------------------------------------------------------------------------------


def store(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rounds to ``dtype``; float16 saturates at its largest finite value, since a rotation may grow by sqrt(2)."""
    if dtype == torch.float16 and x.dtype != torch.float16:
        limit = torch.finfo(torch.float16).max
        x = x.clamp(-limit, limit)
    return x.to(dtype)


def rotate(
    x: torch.Tensor,
    frames: torch.Tensor,
    rope: RopeTables | None,
    *,
    first_token: int = 0,
    inverse: bool = False,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rotates ``x [..., B, N, H, D]`` at frame numbers ``frames`` int64 ``[B or 1, entries]``; ``inverse`` undoes it.

    Each entry of ``frames`` serves ``N / entries`` consecutive tokens; the first token of ``x`` is token
    ``first_token`` of its frame. Angles are reduced in turns in float64, the rest is float32 (float64 for float64).
    """
    dtype = dtype or x.dtype
    if rope is None:
        return store(x, dtype)
    tokens, precision = x.shape[-3], rope.spatial.dtype
    turns = frames.to(torch.float64)[..., None] * rope.frame_turns
    angles = (2 * math.pi * (turns - turns.round())).repeat_interleave(tokens // frames.shape[1], 1)
    position = (torch.arange(tokens, device=x.device) + first_token) % rope.frame_tokens
    spatial = rope.spatial[position].expand(angles.shape[0], -1, -1, -1)
    cos = torch.cat([angles.cos().to(precision), spatial[..., 0]], -1)[:, :, None]
    sin = torch.cat([angles.sin().to(precision), spatial[..., 1]], -1)[:, :, None]
    if inverse:
        sin = -sin
    x = x.to(precision)
    a, b = x.chunk(2, -1) if rope.half_split else x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    return store(torch.cat(turned, -1) if rope.half_split else torch.stack(turned, -1).flatten(-2), dtype)


# --- the cache --------------------------------------------------------------------------------------------------------


def begin_chunk(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_frames: int,
    advancing: torch.Tensor | None,
    decay: torch.Tensor | None,
    rope: RopeTables | None,
    geometry: CacheGeometry,
    before_window: bool,
) -> None:
    """Fuses the frames that leave the window, oldest first, and re-rotates the sink: ``sink += w * (evicted - sink)``.

    cache: all layers. num_frames: int64 [B] *before* the new frames (not advanced here). advancing: bool [B] or None
    (all). decay: ``[2, H_kv]`` with alpha and 1 - alpha, or None for a static sink.
    """
    if geometry.sink_frames == 0:
        return
    before, grown = num_frames, num_frames + new_frames
    after = grown if advancing is None else torch.where(advancing, grown, before)
    first, last = geometry.evicted_frames(before), geometry.evicted_frames(after)
    if decay is not None:
        for step in range(new_frames):
            evicted = first + step
            _fuse(cache, geometry.sink_frames + evicted, evicted < last, decay, rope, geometry)
    moved = (last > first)[:, None, None, None]
    tokens = geometry.sink_frames * geometry.frame_tokens
    image_k, image_v = cache.k[:, :, :tokens], cache.v[:, :, :tokens]
    if cache.sink_k is not None:
        slots = torch.arange(geometry.sink_frames, device=num_frames.device)
        positions = geometry.sink_position(slots, after[:, None], before_window).expand(len(after), -1)
        image_k.copy_(torch.where(moved, rotate(cache.sink_k, positions, rope, dtype=cache.k.dtype), image_k))
    if cache.sink_v is not None:
        image_v.copy_(torch.where(moved, store(cache.sink_v, cache.v.dtype), image_v))


def _fuse(
    cache: CacheTensors,
    frame: torch.Tensor,
    leaves: torch.Tensor,
    decay: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
) -> None:
    """Fuses frame ``frame[b]`` of every sample into its sink slot where ``leaves[b]``."""
    samples = torch.arange(len(frame), device=frame.device)
    leaves = leaves[:, None, None, None]

    def frames_of(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (-1, geometry.frame_tokens))  # a view [L, B, frames, T, H, D]

    evicted_k = frames_of(cache.k)[:, samples, geometry.slot(frame)]
    evicted_v = frames_of(cache.v)[:, samples, geometry.slot(frame)]
    evicted_k = rotate(evicted_k, frame[:, None], rope, inverse=True, dtype=accumulate_dtype(cache.k.dtype))
    for cached, own, evicted in ((cache.k, cache.sink_k, evicted_k), (cache.v, cache.sink_v, evicted_v)):
        sums = frames_of(cached if own is None else own)
        old = sums[:, samples, geometry.fuse_slot(frame)]
        sums[:, samples, geometry.fuse_slot(frame)] = torch.where(leaves, fold(old, evicted, decay), old)


def fold(sink: torch.Tensor, evicted: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
    """One step of the moving average; ``sink``'s dtype decides how it is rounded.

    float32 and float64: ``sink + w * (evicted - sink)``, which leaves a constant where it is. A half dtype reproduces
    the published arithmetic: both products and the sum rounded.
    """
    alpha, weight = decay[:, :, None]  # [H_kv, 1], broadcast over [..., H_kv, D]
    half = sink.dtype.itemsize == 2
    if half:
        evicted = store(evicted, sink.dtype)
    wide, evicted = sink.to(decay.dtype), evicted.to(decay.dtype)
    if half:
        kept, added = store(alpha * wide, sink.dtype), store(weight * evicted, sink.dtype)
        folded = store(kept.to(decay.dtype) + added.to(decay.dtype), sink.dtype)
    else:
        folded = wide + weight * (evicted - wide)
    return torch.where(weight != 0, folded, sink)


def write(
    cache: CacheTensors,
    num_frames: torch.Tensor,
    new_k: torch.Tensor,
    new_v: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
) -> None:
    """Writes ``new_k, new_v [B, F * T, H_kv, D]`` of one layer into the open frames, replacing what they hold."""
    count = new_k.shape[1] // geometry.frame_tokens
    frames = open_frames(num_frames, count)
    present = frames >= 0
    # A missing frame writes back what its ring slot holds; F <= W keeps the slots of a chunk distinct.
    ring = geometry.sink_frames + (frames - geometry.sink_frames) % geometry.window_frames
    slots = torch.where(present, geometry.slot(frames), ring)
    samples = torch.arange(len(frames), device=frames.device)[:, None]
    rotated = rotate(new_k, frames, rope, dtype=cache.k.dtype)
    for cached, new in ((cache.k, rotated), (cache.v, store(new_v, cache.v.dtype))):
        by_frame = cached.unflatten(1, (-1, geometry.frame_tokens))
        new = new.unflatten(1, (-1, geometry.frame_tokens))
        by_frame[samples, slots] = torch.where(present[:, :, None, None, None], new, by_frame[samples, slots])

    source = torch.arange(geometry.sink_frames, device=frames.device) - frames[:, :1]  # chunk frame of a sink slot
    open_slot = ((source >= 0) & (source < count))[:, :, None, None, None]
    for own, new in ((cache.sink_k, new_k), (cache.sink_v, new_v)):
        if own is not None and geometry.sink_frames > 0:
            by_frame = own.unflatten(1, (-1, geometry.frame_tokens))
            new = store(new, own.dtype).unflatten(1, (-1, geometry.frame_tokens))
            by_frame.copy_(torch.where(open_slot, new[samples, source.clamp(0, count - 1)], by_frame))


# --- attention --------------------------------------------------------------------------------------------------------


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
    if sink_q is not None:
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


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_frames: torch.Tensor,
    rope: RopeTables | None,
    geometry: CacheGeometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The open chunk's queries over the valid prefix of one layer's cache: out in the cache's dtype, and lse."""
    frames = open_frames(num_frames, q.shape[1] // geometry.frame_tokens)
    q = rotate(q, frames, rope, dtype=accumulate_dtype(k.dtype))
    keys = torch.arange(k.shape[1], device=k.device)
    seen = keys < geometry.valid_frames(num_frames)[:, None] * geometry.frame_tokens
    present = (frames >= 0).repeat_interleave(geometry.frame_tokens, 1)
    out, lse = dense_attention(q, k, v, present[:, :, None] & seen[:, None, :], scale)
    return out.to(k.dtype), lse


def past_tensors(past: Past) -> tuple[torch.Tensor, torch.Tensor]:
    """The frames of a past as ``[B, P * T, H_kv, D]`` tensors (a copy that lives as long as the call)."""
    batch = len(past.num_frames)

    def gather(frames: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(frames).unflatten(0, (batch, -1)).flatten(1, 2)

    return gather(past.k), gather(past.v)


def chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: Past,
    rope: RopeTables | None,
    geometry: CacheGeometry,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `write` and `attend` give for the open chunk, computed from its past without writing anything."""
    count = q.shape[1] // geometry.frame_tokens
    frames = open_frames(past.num_frames, count)
    q = rotate(q, frames, rope, dtype=accumulate_dtype(past.dtype))
    k, v = rotate(k, frames, rope, dtype=past.dtype), store(v, past.dtype)
    present = (frames >= 0).repeat_interleave(geometry.frame_tokens, 1)
    seen = present
    if past.k:
        past_k, past_v = past_tensors(past)
        valid = (geometry.valid_frames(past.num_frames) - count).clamp(min=0) * geometry.frame_tokens
        seen = torch.cat([torch.arange(past_k.shape[1], device=q.device) < valid[:, None], present], 1)
        k, v = torch.cat([past_k, k], 1), torch.cat([past_v, v], 1)
    out, lse = dense_attention(q, k, v, present[:, :, None] & seen[:, None, :], scale)
    return out.to(past.dtype), lse


def sink_window_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: RopeTables | None,
    mask: WindowMask,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Full-sequence attention under ``mask``; with a rope, sinks sit right before each query's window.

    q holds the last N_q of the N_k positions. out in v's dtype.
    """
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


def merge_attention(
    out1: torch.Tensor, lse1: torch.Tensor, out2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of two disjoint sets of keys, from the results over each."""
    empty = (lse1 == -torch.inf) & (lse2 == -torch.inf)
    lse1, lse2 = (
        torch.where(empty, 0.0, lse1),
        torch.where(empty, 0.0, lse2),
    )  # finite, for the gradient's sake
    lse = torch.logaddexp(lse1, lse2)
    weight1, weight2 = ((part - lse).exp().transpose(1, 2)[..., None] for part in (lse1, lse2))
    out = weight1 * out1.to(lse.dtype) + weight2 * out2.to(lse.dtype)
    out = torch.where(empty.transpose(1, 2)[..., None], 0.0, out)
    return out.to(out1.dtype), torch.where(empty, -torch.inf, lse)


# --- Re-DMD -----------------------------------------------------------------------------------------------------------


def redmd_loss(
    x: torch.Tensor,
    fake: torch.Tensor,
    real_cond: torch.Tensor,
    real_uncond: torch.Tensor | None,
    fake_uncond: torch.Tensor | None,
    weight: torch.Tensor,
    mask: torch.Tensor | None,
    guidance_scale: float,
    fake_guidance_scale: float,
    need_grad: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Re-DMD (paper, section 3.3): the loss, and its gradient in x in x's dtype (empty unless need_grad).

    All latents ``[B, ...]``, weight ``[B]``, mask bool of x's shape or None.
    """
    precision = accumulate_dtype(x.dtype)
    per_sample = (-1,) + (1,) * (x.dim() - 1)

    def guided(cond: torch.Tensor, uncond: torch.Tensor | None, scale: float) -> torch.Tensor:
        cond = cond.to(precision)
        return cond if uncond is None else cond + scale * (cond - uncond.to(precision))

    real = guided(real_cond, real_uncond, guidance_scale)
    norm = (x.to(precision) - real).abs().flatten(1).mean(1).view(per_sample)
    grad = (guided(fake, fake_uncond, fake_guidance_scale) - real) / norm
    grad = torch.where(grad.isfinite(), grad, 0)
    if mask is not None:
        grad = grad * mask
    count = torch.full((), x.numel(), device=x.device) if mask is None else mask.sum()
    weight = weight / count.clamp(min=1)
    loss = 0.5 * (weight * grad.square().flatten(1).sum(1)).sum()
    return loss, (weight.view(per_sample) * grad).to(x.dtype) if need_grad else x.new_empty(0)
