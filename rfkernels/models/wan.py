"""The Wan 2.1 video transformer, made causal chunk by chunk on the ops of this package.

Module names are those of the original checkpoints. Latents are ``[B, F, C, h, w]`` (frames before channels); tokens are
ordered (frame, row, column).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .. import checks
from ..attention import chunk_attention, merge_attention, sink_window_attention, streaming_attention
from ..cache import EMASinkCache
from ..contexts import Context
from ..contract.requests import accumulate_dtype
from ..rope import Rope3D
from .config import CausalWanConfig
from .norms import LayerNorm, RMSNorm

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
KV = tuple[torch.Tensor, torch.Tensor]


class MaskTokens(TypedDict):
    """A `ChunkMask` in tokens: arguments of `sink_window_attention`."""

    sink_tokens: int
    window_tokens: int
    chunk_tokens: int | list[int]
    first_chunk_tokens: int | None


@dataclass(frozen=True)
class ChunkMask:
    """What a full-sequence pass of a causal model sees: the chunks, sinks and window of a stream with alpha = 1.

    Args:
        chunk_frames: frames of a chunk, or the frames of every chunk of the clip.
        sink_frames, window_frames: as in `EMASinkCache`; the window includes the own chunk.
        first_chunk_frames: of the first chunk, up to the window; default as the others.

    Raises:
        ValueError, TypeError: naming the field.
    """

    chunk_frames: int | Sequence[int] = 3
    sink_frames: int = 3
    window_frames: int = 6
    first_chunk_frames: int | None = None

    def __post_init__(self) -> None:
        checks.integer("sink_frames", self.sink_frames, 0)
        checks.chunks(self.chunk_frames, self.first_chunk_frames, self.window_frames)

    def tokens(self, frame_tokens: int) -> MaskTokens:
        """The arguments of `sink_window_attention`."""
        chunk, first = self.chunk_frames, self.first_chunk_frames
        return {
            "sink_tokens": self.sink_frames * frame_tokens,
            "window_tokens": self.window_frames * frame_tokens,
            "chunk_tokens": chunk * frame_tokens if isinstance(chunk, int) else [n * frame_tokens for n in chunk],
            "first_chunk_tokens": None if first is None else first * frame_tokens,
        }


def _bidirectional(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope3D) -> torch.Tensor:
    tokens = q.shape[1]
    return sink_window_attention(q, k, v, sink_tokens=0, window_tokens=None, chunk_tokens=tokens, rope=rope)


def _chunk_causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope3D, mask: MaskTokens) -> torch.Tensor:
    return sink_window_attention(q, k, v, **mask, rope=rope)


def _teacher_forcing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope3D, mask: MaskTokens) -> torch.Tensor:
    """Tokens are [clean | noisy]: a noisy chunk sees itself and the clean frames before it."""
    (clean_q, noisy_q), (clean_k, noisy_k), (clean_v, noisy_v) = (x.chunk(2, 1) for x in (q, k, v))
    clean = sink_window_attention(clean_q, clean_k, clean_v, **mask, rope=rope)
    past, past_lse = sink_window_attention(
        noisy_q, clean_k, clean_v, **mask, rope=rope, own_chunk=False, return_lse=True
    )
    own, own_lse = _own_chunk(noisy_q, noisy_k, noisy_v, rope, mask)
    noisy, _ = merge_attention(past, past_lse, own, own_lse)
    return torch.cat([clean, noisy], 1)


def _own_chunk(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rope: Rope3D, mask: MaskTokens) -> KV:
    """Every chunk sees itself alone: (out, lse) with a window of one chunk. A first chunk longer than the others, which
    that window would cut, is a call of its own; only differences of positions matter."""
    chunk, tokens = mask["chunk_tokens"], q.shape[1]
    if isinstance(chunk, list):
        parts = [(end - size, end, size, size) for size, end in zip(chunk, accumulate(chunk), strict=True)]
    else:
        first = mask["first_chunk_tokens"] or chunk
        parts = [(0, min(first, tokens), first, first), (first, tokens, chunk, chunk)]
        parts = parts if first > chunk else [(0, tokens, chunk, first)]
    results = [
        sink_window_attention(
            *(x[:, start:end] for x in (q, k, v)), sink_tokens=0, window_tokens=size, chunk_tokens=size,
            first_chunk_tokens=first, rope=rope, return_lse=True,
        )
        for start, end, size, first in parts if start < end
    ]  # fmt: skip
    if len(results) == 1:
        return results[0]
    outs, lses = zip(*results, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


class Attention(nn.Module):
    """Projections of an attention."""

    def __init__(self, config: CausalWanConfig):
        super().__init__()
        dim = config.dim
        self.head_dim = config.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = RMSNorm(dim, config.eps) if config.qk_norm else nn.Identity()

    def heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def keys_values(self, x: torch.Tensor) -> KV:
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        return self.heads(self.norm_q(self.q(x)))


class SelfAttention(Attention):
    def forward(self, x: torch.Tensor, attend: Attend) -> torch.Tensor:
        """``attend`` on the tokens' own queries, keys and values."""
        return self.o(attend(self.queries(x), *self.keys_values(x)).flatten(2))


class CrossAttention(Attention):
    def forward(self, x: torch.Tensor, kv: KV) -> torch.Tensor:
        """Every query to all of ``kv``."""
        q = self.queries(x)
        q, k, v = (t.to(q.dtype).transpose(1, 2) for t in (q, *kv))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: CausalWanConfig):
        super().__init__()
        dim, eps = config.dim, config.eps
        self.norm1 = LayerNorm(dim, eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = LayerNorm(dim, eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.norm2 = LayerNorm(dim, eps, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: torch.Tensor | None, time: torch.Tensor | None, attend: Attend | None, context: torch.Tensor | KV
    ) -> torch.Tensor | KV:
        """x: ``[B, F * T, dim]``; time: float32 ``[B, F, 6, dim]``; context: ``[B, n, dim]``, or its keys and values.

        Without x returns the context's keys and values, so that what wraps this forward (FSDP) wraps that too.
        """
        kv = self.cross_attn.keys_values(context) if isinstance(context, torch.Tensor) else context
        if x is None or time is None or attend is None:
            return kv
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (self.modulation.to(time.dtype) + time).unbind(2)
        x = _gated(x, self.self_attn(_modulated(self.norm1(x), shift, scale), attend), gate)
        x = x + self.cross_attn(self.norm3(x), kv)
        return _gated(x, self.ffn(_modulated(self.norm2(x), ffn_shift, ffn_scale)), ffn_gate)


class Head(nn.Module):
    def __init__(self, config: CausalWanConfig):
        super().__init__()
        self.norm = LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, config.out_channels * math.prod(config.patch_size))
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """time: float32 ``[B, F, dim]``."""
        shift, scale = (self.modulation.to(time.dtype) + time.unsqueeze(2)).unbind(2)
        return self.head(_modulated(self.norm(x), shift, scale))


def _per_frame(x: torch.Tensor, frames: int) -> torch.Tensor:
    return x.unflatten(1, (frames, -1))


def _modulated(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``x * (1 + scale) + shift`` with one scale and shift ``[B, F, dim]`` a frame, in their dtype."""
    y = _per_frame(x, shift.shape[1]).to(shift.dtype) * (1 + scale.unsqueeze(2)) + shift.unsqueeze(2)
    return y.flatten(1, 2).to(x.dtype)


def _gated(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x + y * gate`` with one gate ``[B, F, dim]`` a frame. Not a view: a block's output carries FSDP2's hook."""
    return (x + (_per_frame(y, gate.shape[1]) * gate.unsqueeze(2)).flatten(1, 2)).to(x.dtype)


class CausalWan(nn.Module):
    """The Wan 2.1 text-to-video transformer, chunk-causal (Self Forcing; "Reward Forcing", arXiv 2512.04678).

    It predicts the flow ``v = eps - x0`` of noisy latents. All weights are in the state dict under Wan's own names.

    Args:
        config: sizes, or the name of a preset ("wan2.1-t2v-1.3b", "wan2.1-t2v-14b", "wan2.2-ti2v-5b",
            "tiny").
        checkpointing: recompute blocks in the backward pass instead of keeping their activations.

    Raises:
        ValueError: an unknown preset.
    """

    def __init__(self, config: CausalWanConfig | str = "wan2.1-t2v-1.3b", checkpointing: bool = False):
        super().__init__()
        config = CausalWanConfig.preset(config) if isinstance(config, str) else config
        self.config, self.checkpointing = config, checkpointing
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self._ropes: dict[tuple[int, int], Rope3D] = {}
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for projections, small embeddings, a head that starts at zero: the first prediction is 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for sequence in (self.text_embedding, self.time_embedding):
            for layer in sequence:
                if isinstance(layer, nn.Linear):
                    nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model computes. (accelerate's offloading leaves the weights on the meta device between passes.)"""
        weight = self.patch_embedding.weight
        hook = getattr(self.patch_embedding, "_hf_hook", None) if weight.is_meta else None
        device = getattr(hook, "execution_device", None)
        return weight.device if device is None else torch.empty(0, device=device).device  # with its index

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens in a latent frame, see `CausalWanConfig.grid`."""
        return self.config.grid(height, width)

    def rope(self, height: int, width: int) -> Rope3D:
        """The rotary embedding for latent frames of ``height`` x ``width``."""
        grid = self.grid(height, width)
        if grid not in self._ropes:
            self._ropes[grid] = Rope3D(self.config.head_dim, *grid, theta=self.config.rope_theta)
        return self._ropes[grid]

    def make_cache(self, batch_size: int, height: int, width: int, **options: Any) -> EMASinkCache:
        """An `EMASinkCache` for latent frames of ``height`` x ``width``, in the model's dtype and on its device.

        ``options`` are the cache's: sink_frames (3), window_frames (6), alpha, sink_dtype, sink_positions, ...

        Raises:
            ValueError, TypeError: a size that the patches do not divide; otherwise as `EMASinkCache`.
        """
        own = {"rope": self.rope(height, width), "dtype": self.dtype, "device": self.device}
        return new_cache(self.config, batch_size, height, width, **(own | options))

    def encode_context(self, context: torch.Tensor) -> list[KV]:
        """Keys and values of every layer's cross-attention to text embeddings ``[B, n, text_dim]``, once per prompt.

        Returns:
            for each layer a pair (k, v), each ``[B, n, heads, head_dim]``: what `forward` takes as ``context``.

        Raises:
            ValueError, TypeError: as `forward`.
        """
        return self(None, None, context)

    def forward(
        self,
        latents: torch.Tensor | None,
        timesteps: torch.Tensor | float | None,
        context: torch.Tensor | Sequence[KV],
        cache: EMASinkCache | None = None,
        contexts: Sequence[Context] | None = None,
        mask: ChunkMask | None = None,
        clean: torch.Tensor | None = None,
    ) -> torch.Tensor | list[KV]:
        """The flow of noisy latents.

        Args:
            latents: ``[B, F, C, h, w]``, any h and w that the patches divide. None: see `encode_context`.
            timesteps: in 0..1000, ``[B]``, or ``[B, F]`` with one for each frame, or a number for all.
            context: text embeddings ``[B, n, text_dim]``, or what `encode_context` made of them.
            cache: streaming: the latents are the open chunk of this cache, which is written.
            contexts: the same as a pure function of ``[cache[i].context() for i in range(L)]``; for training.
            mask: with neither, the latents are a whole clip: None sees all of it, a `ChunkMask` is chunk-causal.
            clean: teacher forcing (with ``mask``): clean latents like ``latents``; every noisy chunk sees itself and
                the clean chunks before it. They are given the timestep 0.

        Returns:
            ``[B, F, C, h, w]`` in the dtype of ``latents``.

        Raises:
            ValueError, TypeError: naming the argument; nothing is written then.
        """
        config = self.config
        self._check_weights(context if latents is None else latents)
        if latents is None:
            embedded = self._embedded(context)
            return [block(None, None, None, embedded) for block in self.blocks]
        batch, frames, _, height, width = self._check_latents("latents", latents)
        grid = self.grid(height, width)
        timesteps = frame_timesteps(timesteps, batch, frames, self.device)
        attends = self._attends(grid, latents, cache, contexts, mask, clean)
        texts: Sequence[torch.Tensor | KV]
        if isinstance(context, torch.Tensor):
            texts = [self._embedded(context, batch)] * config.num_layers
        else:
            self._check_cached(context, batch)
            texts = context
        if clean is not None:
            timesteps = torch.cat([torch.zeros_like(timesteps), timesteps], 1)
            latents = torch.cat([clean.to(latents.dtype), latents], 1)

        x = self.patch_embedding(latents.to(self.dtype).transpose(1, 2)).flatten(2).transpose(1, 2)
        embedded = self.time_embedding(_sinusoids(timesteps, config.freq_dim).to(self.dtype))
        time = self.time_projection(embedded).unflatten(-1, (6, -1)).to(accumulate_dtype(self.dtype))
        for block, attend, text in zip(self.blocks, attends, texts, strict=True):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, time, attend, text, use_reentrant=False)
            else:
                x = block(x, time, attend, text)
        if clean is not None:
            x, embedded = x[:, x.shape[1] // 2 :], embedded[:, frames:]
        patches = self.head(x, embedded.to(time.dtype))

        _, p, q = config.patch_size
        patches = patches.reshape(batch, frames, *grid, p, q, config.out_channels)
        video = patches.permute(0, 1, 6, 2, 4, 3, 5)  # [B, F, C, rows, p, columns, q]
        return video.reshape(batch, frames, config.out_channels, height, width).to(latents.dtype)

    def _attends(
        self,
        grid: tuple[int, int],
        latents: torch.Tensor,
        cache: EMASinkCache | None,
        contexts: Sequence[Context] | None,
        mask: ChunkMask | None,
        clean: torch.Tensor | None,
    ) -> list[Attend]:
        """What the self-attention of each layer is."""
        layers, tokens = self.config.num_layers, grid[0] * grid[1]
        if sum(x is not None for x in (cache, contexts, mask)) > 1:
            raise ValueError("at most one of cache, contexts and mask may be given")
        if clean is not None:
            if mask is None:
                raise ValueError("clean latents need mask, the chunks of the clip")
            if self._check_latents("clean", clean) != latents.shape:
                raise ValueError(
                    f"clean must have the shape of latents {tuple(latents.shape)}, got {tuple(clean.shape)}"
                )
        if cache is not None:
            self._check_layers("cache", cache)
            cache._require_chunk()
            self._check_past(latents, tokens, cache.frame_tokens, cache.batch_size, cache.open_frames)
            if self.checkpointing and torch.is_grad_enabled():
                raise ValueError("checkpointing needs contexts instead of cache: a recomputed pass must not write")
            return [partial(streaming_attention, layer=cache[i]) for i in range(layers)]
        if contexts is not None:
            self._check_layers("contexts", contexts)
            first = contexts[0]
            self._check_past(latents, tokens, first.geometry.frame_tokens, first.batch_size, first.frames)
            return [partial(chunk_attention, context=past) for past in contexts]
        rope = self.rope(*latents.shape[-2:])
        if mask is None:
            return [partial(_bidirectional, rope=rope)] * layers
        attend = _chunk_causal if clean is None else _teacher_forcing
        return [partial(attend, rope=rope, mask=mask.tokens(tokens))] * layers

    def _check_layers(self, name: str, layers: Sequence[Any] | EMASinkCache, what: str = "") -> None:
        if len(layers) != self.config.num_layers:
            raise ValueError(f"{name} must have {what}{self.config.num_layers} layers, got {len(layers)}")

    def _check_past(self, latents: torch.Tensor, tokens: int, frame_tokens: int, batch: int, frames: int) -> None:
        """``batch`` and ``frames`` are those of the open chunk."""
        got = (*latents.shape[:2], tokens)
        if got != (batch, frames, frame_tokens):
            allowed = f"{batch} streams of {frames} open frames of {frame_tokens} tokens"
            raise ValueError(f"latents must have the cache's {allowed}, got {got[0]}, {got[1]} and {got[2]}")

    def _check_weights(self, given: Any) -> None:
        if self.device.type == "meta" and isinstance(given, torch.Tensor) and not given.is_meta:
            raise ValueError(
                "the model must hold its weights, got them on the meta device: load_checkpoint(model, path, "
                "assign=True); to offload them, accelerate.cpu_offload(model, device)"
            )

    def _check_latents(self, name: str, latents: torch.Tensor) -> torch.Size:
        checks.tensor(name, latents, 5, self.device)
        checks.shape(name, latents, B=None, F=None, C=self.config.in_channels, h=None, w=None)
        return latents.shape

    def _embedded(self, context: torch.Tensor | Sequence[KV], batch: int | None = None) -> torch.Tensor:
        text = checks.embeddings("context", context, self.device)
        checks.shape("context", text, batch=batch, tokens=None, text_dim=self.config.text_dim)
        return self.text_embedding(text.to(self.dtype))

    def _check_cached(self, context: Sequence[KV], batch: int) -> None:
        checks.no_text("context", context)
        self._check_layers("context", context, "(k, v) of ")
        heads, head_dim = self.config.num_heads, self.config.head_dim
        for name, x in zip(("context's k", "context's v"), context[0], strict=True):
            checks.tensor(name, x, 4, self.device)
            checks.shape(name, x, batch=batch, tokens=None, heads=heads, head_dim=head_dim)


def new_cache(config: CausalWanConfig, batch_size: int, height: int, width: int, **options: Any) -> EMASinkCache:
    """An `EMASinkCache` for a transformer of these sizes and latent frames of ``height`` x ``width``; further arguments
    are the cache's."""
    rows, columns = config.grid(height, width)
    defaults: dict[str, Any] = {"sink_frames": 3, "window_frames": 6}
    if "rope" not in options:
        defaults["rope"] = Rope3D(config.head_dim, rows, columns, theta=config.rope_theta)
    return EMASinkCache(
        num_layers=config.num_layers, batch_size=batch_size, num_kv_heads=config.num_heads, head_dim=config.head_dim,
        frame_tokens=rows * columns, **(defaults | options),
    )  # fmt: skip


def frame_timesteps(
    timesteps: torch.Tensor | float | None, batch: int, frames: int, device: torch.device
) -> torch.Tensor:
    """``[B, F]`` of timesteps given as in `CausalWan.forward`.

    Raises:
        ValueError, TypeError: naming timesteps.
    """
    if not isinstance(timesteps, torch.Tensor) and checks.is_real(timesteps):
        timesteps = torch.full((batch,), float(timesteps), device=device)
    if not isinstance(timesteps, torch.Tensor):
        got = "None" if timesteps is None else type(timesteps).__name__
        raise TypeError(f"timesteps must be a tensor [B={batch}] or [B, F={frames}], or a number for all, got {got}")
    if timesteps.dim() == 0:
        timesteps = timesteps.expand(batch)
    if timesteps.shape == (batch,):
        timesteps = timesteps[:, None]
    if timesteps.shape not in ((batch, 1), (batch, frames)):
        raise ValueError(f"timesteps must be [B={batch}] or [B, F={frames}], got shape {tuple(timesteps.shape)}")
    return timesteps.expand(batch, frames)


def _sinusoids(timesteps: torch.Tensor, size: int) -> torch.Tensor:
    """``[..., size]``: cosines, then sines, of ``t * 10000 ** (-i / (size / 2))``, formed in float64."""
    half = size // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / -half
    angles = timesteps.double().unsqueeze(-1) * torch.pow(10000.0, exponents)
    return torch.cat([angles.cos(), angles.sin()], -1)
