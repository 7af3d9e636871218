"""diffusers' Wan transformer on this package's cache: an attention processor, and what a sampler drives.

A processor is given queries' and keys' rotation apart, so its keys are un-rotated, as the cache takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .. import checks
from ..attention import streaming_attention
from ..cache import CacheLayer, EMASinkCache
from ..models.checkpoints import config_of
from ..models.wan import frame_timesteps, new_cache
from ..rope import Rope3D


class StreamingProcessor:
    """Of a self-attention: its queries, keys and values go to `streaming_attention` on ``layer``, one of a cache.

    Projections and norms are the attention's own, so that LoRA, quantised and fused ones work. The rotation that comes
    with a call is not used: it knows nothing of the frames before.

    Args:
        layer: ``cache[i]``; may be set later, and to that of another cache.
    """

    def __init__(self, layer: CacheLayer | None = None):
        self.layer: Any = layer

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Any = None,
        **unknown: Any,
    ) -> torch.Tensor:
        if encoder_hidden_states is not None or attention_mask is not None or unknown:
            raise ValueError("a StreamingProcessor is for self-attention without a mask or further arguments")
        if attn.fused_projections:
            q, k, v = attn.to_qkv(hidden_states).chunk(3, -1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        out = streaming_attention(q, k, v, self.layer).flatten(2)
        for part in attn.to_out:
            out = part(out)
        return out


def patch(transformer: nn.Module, cache: EMASinkCache) -> Callable[[], None]:
    """Makes every pass of diffusers' ``WanTransformer3DModel`` one over the open chunk of ``cache``, in place.

    The code around it stays as it is: it calls ``cache.begin_chunk(F)`` before the first pass over a chunk, and the
    transformer with ``hidden_states`` ``[B, C, F, h, w]``, as often as it likes. ``timestep`` is ``[B]``, one for the
    whole chunk, or ``[B, tokens]``, as pipelines of Wan 2.2 5B give it. Only the processors of ``blocks[i].attn1`` are
    replaced: weights, their names, hooks and adapters stay, and may change later. For guidance with two prompts in one
    call the cache has a stream for each half of the batch; with two calls, patch and undo around each.

    Args:
        transformer: the transformer of Wan 2.1 or of Wan 2.2 5B, or what holds it (``torch.compile``, peft, DDP).
        cache: with its layers, heads and rope, such as ``DiffusersWan(transformer).make_cache(1, 60, 104, alpha=0.999,
            sink_positions="before_window", sink_dtype=None)``.

    Returns:
        undo: takes no argument and puts the processors back.

    Raises:
        TypeError, ValueError: not that transformer, or one with image conditioning, or that is patched already; a cache
            that does not fit it. Nothing is changed then. In a pass: latents that are not the open chunk; diffusers'
            caching or context parallelism, gradient checkpointing.
    """
    seam = Seam(transformer)
    seam.check_cache(cache)

    def before_pass(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seam.check_pass(args[0] if args else kwargs["hidden_states"], cache)

    own = seam.install(cache)
    hook = seam.transformer.register_forward_pre_hook(before_pass, with_kwargs=True)

    def undo() -> None:
        if any(a.processor is not p for a, p in zip(seam.attentions, seam.processors, strict=True)):
            raise RuntimeError("undo: the processors have been replaced since the patch, or it is undone already")
        seam.put_back(own)
        hook.remove()

    return undo


class Seam:
    """The self-attentions of a transformer, in order, and the processors that stream."""

    def __init__(self, transformer: Any):
        from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformer3DModel

        if not isinstance(transformer, nn.Module):
            raise TypeError(f"transformer must be diffusers' WanTransformer3DModel, got {type(transformer).__name__}")
        found = [module for module in transformer.modules() if isinstance(module, WanTransformer3DModel)]
        if len(found) != 1:
            raise TypeError(
                f"transformer must be diffusers' WanTransformer3DModel, or hold one, got {type(transformer).__name__} "
                f"with {len(found)} of them"
            )
        self.transformer: Any = found[0]
        self.config = config_of(self.transformer.config, "transformer.config")
        self.attentions: list[Any] = [
            module
            for name, module in self.transformer.blocks.named_modules()
            if "attn1" in name.split(".") and isinstance(module, WanAttention)
        ]
        if len(self.attentions) != self.config.num_layers:
            raise ValueError(
                f"transformer must have a WanAttention as attn1 in each of its {self.config.num_layers} blocks, got "
                f"{len(self.attentions)}"
            )
        self.processors = [StreamingProcessor() for _ in self.attentions]

    @property
    def device(self) -> torch.device:
        """Where it computes, also while its weights are offloaded."""
        for module in self.transformer.modules():  # accelerate's hooks
            device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
            if device is not None:
                return torch.empty(0, device=device).device
        return self.transformer.device

    def check_cache(self, cache: EMASinkCache) -> None:
        """Raises unless the cache is of this transformer's sizes."""
        if not isinstance(cache, EMASinkCache):
            raise TypeError(f"cache must be an EMASinkCache, got {type(cache).__name__}")
        config = self.config
        allowed = (config.num_layers, config.num_heads, config.head_dim)
        got = (cache.num_layers, cache.num_kv_heads, cache.head_dim)
        if got != allowed:
            raise ValueError(
                f"cache must have the transformer's {allowed[0]} layers of {allowed[1]} heads of size {allowed[2]}, "
                f"got {got[0]}, {got[1]} and {got[2]}"
            )
        if not isinstance(cache.rope, Rope3D) or cache.rope.height is None:
            raise ValueError(f"cache must have a Rope3D with rows and columns, got rope={cache.rope}")

    def check_pass(self, latents: torch.Tensor, cache: EMASinkCache) -> None:
        """Raises unless ``[B, C, F, h, w]`` are the open chunk of a checked cache, and a pass would run all of it."""
        cache._require_chunk()
        checks.tensor("hidden_states", latents, 5)
        batch, _, frames, height, width = latents.shape
        rope: Any = cache.rope
        allowed = (cache.batch_size, cache.open_frames, rope.height, rope.width)
        got = (batch, frames, *self.config.grid(height, width))
        if got != allowed:
            raise ValueError(
                f"hidden_states must be the {allowed[0]} streams of {allowed[1]} open frames of {allowed[2]} x "
                f"{allowed[3]} tokens that the cache has, got {got[0]} of {got[1]} of {got[2]} x {got[3]}"
            )
        if getattr(self.transformer, "is_cache_enabled", False):
            raise ValueError(
                "transformer must not leave out blocks or attentions, whose keys and values later chunks need: call "
                "transformer.disable_cache()"
            )
        if getattr(self.transformer, "_parallel_config", None) is not None:
            raise ValueError("transformer must not be split over devices: the cache holds every token of a frame")
        if self.transformer.gradient_checkpointing and torch.is_grad_enabled():
            raise ValueError(
                "transformer must not use gradient checkpointing, which would run a pass again after the cache has "
                "moved on: call transformer.disable_gradient_checkpointing(), or train a CausalWan with contexts"
            )

    def install(self, cache: EMASinkCache) -> list[Any]:
        """Puts the streaming processors in place, on the layers of ``cache``; returns those that were there."""
        own = [attention.processor for attention in self.attentions]
        if any(isinstance(processor, StreamingProcessor) for processor in own):
            raise ValueError("transformer is patched already: call what that patch returned first")
        for attention, processor, layer in zip(self.attentions, self.processors, cache, strict=True):
            processor.layer = layer
            attention.set_processor(processor)
        return own

    def put_back(self, own: list[Any]) -> None:
        for attention, processor in zip(self.attentions, own, strict=True):
            attention.set_processor(processor)


class DiffusersWan:
    """diffusers' ``WanTransformer3DModel`` in place of a `CausalWan`, for `StreamingSampler` and loops like it.

    The transformer streams in calls of this object only, and is as it was between them: several samplers, and
    pipelines, may take turns with it, pass by pass. It is called through hooks, adapters and ``torch.compile``.

    With guidance every pass has both prompts in one batch, and the cache a stream for each:
    ``flow = negative + guidance_scale * (positive - negative)``.

    Args:
        transformer: as in `patch`.
        guidance_scale: 1, none, or more.
        negative: embeddings ``[1 or B, n, text_dim]`` of the negative prompt, for guidance.
        attention_kwargs: passed on, e.g. ``{"scale": 0.5}`` of a LoRA.

    Raises:
        TypeError, ValueError: as `patch`; guidance without ``negative`` or the other way round.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        guidance_scale: float = 1.0,
        negative: torch.Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ):
        self._seam = Seam(transformer)
        self.transformer, self.attention_kwargs = transformer, attention_kwargs
        self.guidance_scale = checks.number("guidance_scale", guidance_scale, 1, float("inf"))
        if (negative is None) != (guidance_scale == 1):
            raise ValueError(
                f"guidance_scale above 1 and negative go together, got {guidance_scale} and "
                f"{'no ' if negative is None else ''}negative"
            )
        self.negative = None if negative is None else self._text("negative", negative)

    @property
    def config(self) -> Any:
        """The transformer's sizes, a `CausalWanConfig`."""
        return self._seam.config

    @property
    def dtype(self) -> torch.dtype:
        """In which it computes, whatever its weights are stored in."""
        return self._seam.transformer.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes, also while its weights are offloaded."""
        return self._seam.device

    def parameters(self) -> Iterator[torch.Tensor]:
        """The transformer's weights."""
        return self._seam.transformer.parameters()

    def make_cache(self, batch_size: int, height: int, width: int, **options: Any) -> EMASinkCache:
        """An `EMASinkCache` for latent frames of ``height`` x ``width``, as `CausalWan.make_cache`; with guidance of
        ``2 * batch_size`` streams, those of the negative prompt last."""
        streams = batch_size if self.negative is None else 2 * checks.integer("batch_size", batch_size, 1)
        own = {"dtype": self.dtype, "device": self.device}
        return new_cache(self.config, streams, height, width, **(own | options))

    def encode_context(self, context: torch.Tensor) -> torch.Tensor:
        """Embeddings ``[B, n, text_dim]``, as a pass takes them: followed by those of the negative prompt."""
        text = self._text("context", context)
        if self.negative is None:
            return text
        if len(self.negative) not in (1, len(text)) or self.negative.shape[1] != text.shape[1]:
            raise ValueError(
                f"context must have the tokens of negative and as many prompts, got {tuple(text.shape)} and "
                f"{tuple(self.negative.shape)}"
            )
        return torch.cat([text, self.negative.to(text).expand(len(text), -1, -1)])

    def _text(self, name: str, text: torch.Tensor) -> torch.Tensor:
        checks.embeddings(name, text)
        checks.shape(name, text, batch=None, tokens=None, text_dim=self.config.text_dim)
        return text.to(self.device, self.dtype)

    def __call__(
        self, latents: torch.Tensor, timesteps: torch.Tensor | float, context: torch.Tensor, cache: EMASinkCache
    ) -> torch.Tensor:
        """The flow of the open chunk of ``cache``, which is written; as `CausalWan.forward`.

        Args:
            latents: ``[B, F, C, h, w]``.
            timesteps: in 0..1000, ``[B]``, or ``[B, F]`` with one for each frame, or a number for all.
            context: what `encode_context` made of the prompt; the pass is in its dtype.
            cache: of `make_cache`.

        Returns:
            ``[B, F, C, h, w]`` in the dtype of ``latents``.

        Raises:
            ValueError, TypeError: naming the argument; nothing is written then.
        """
        checks.tensor("latents", latents, 5)
        checks.shape("latents", latents, B=None, F=None, C=self.config.in_channels, h=None, w=None)
        batch, frames = latents.shape[:2]
        times = frame_timesteps(timesteps, batch, frames, latents.device)
        self._seam.check_cache(cache)
        # One timestep for all tokens where there is one: modulations for each would fill memory, with the same numbers.
        given = timesteps.shape[1:] if isinstance(timesteps, torch.Tensor) else ()
        times = times.repeat_interleave(cache.frame_tokens, 1) if given == (frames,) and frames > 1 else times[:, 0]
        checks.embeddings("context", context)
        checks.shape("context", context, batch=cache.batch_size, tokens=None, text_dim=self.config.text_dim)
        x = latents.to(context.dtype).transpose(1, 2)  # asking diffusers for its dtype takes milliseconds
        if self.negative is not None:
            x, times = torch.cat([x, x]), torch.cat([times, times])
        self._seam.check_pass(x, cache)
        with self._streaming(cache):
            flow = self.transformer(
                hidden_states=x, timestep=times, encoder_hidden_states=context, return_dict=False,
                attention_kwargs=self.attention_kwargs,
            )[0]  # fmt: skip
        flow = flow.transpose(1, 2).to(latents.dtype)
        if self.negative is None:
            return flow
        positive, negative = flow.chunk(2)
        return negative + self.guidance_scale * (positive - negative)

    @contextmanager
    def _streaming(self, cache: EMASinkCache) -> Iterator[None]:
        own = self._seam.install(cache)
        try:
            yield
        finally:
            self._seam.put_back(own)
