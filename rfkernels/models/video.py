"""From text to embeddings and from latents to pictures, with transformers' UMT5 and diffusers' Wan VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks


class StreamingDecoder:
    """Decodes latents chunk by chunk with diffusers' ``AutoencoderKLWan``, keeping its feature cache in between.

    Any division into chunks gives the frames of decoding the whole at once; memory does not grow. One decoder is one
    video: several can share a VAE.

    Args:
        vae: an ``AutoencoderKLWan``, on its device and in its dtype, without tiling and slicing.

    Raises:
        ValueError: a VAE with options that would be ignored here.
    """

    def __init__(self, vae: Any):
        self.vae = vae
        self._check()
        self.reset()

    def _check(self) -> None:
        """What would be ignored, or fail in the middle: the VAE's parts are called here, not its own decode."""
        for how in ("tiling", "slicing"):
            if getattr(self.vae, f"use_{how}", False):
                raise ValueError(
                    f"vae must have {how} off, which a decoder that keeps features from call to call does not do: "
                    f"call vae.disable_{how}()"
                )
        if self.vae.device.type == "meta":
            raise ValueError("vae must hold its weights, got them on the meta device: take offloading off first")

    def reset(self) -> None:
        """Starts another video."""
        # The list that the VAE's own decode makes for one call; holding it ourselves keeps it from call to call.
        self.vae.clear_cache()
        self._features, self._first = self.vae._feat_map, True
        self.vae.clear_cache()

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Frames ``[B, n, 3, H, W]`` in -1..1 of the next latents ``[B, F, C, h, w]``: 4 for each latent frame, but 1
        for the first one of a video. Latents are normalised, as the transformer has them.

        Raises:
            ValueError: other channels than the VAE has; tiling or slicing of the VAE.
        """
        self._check()
        _bring(self.vae)
        config, like = self.vae.config, dict(device=self.vae.device, dtype=self.vae.dtype)
        checks.tensor("latents", latents, 5)
        checks.shape("latents", latents, batch=None, frames=None, channels=config.z_dim, height=None, width=None)
        mean, std = (torch.tensor(c, **like)[:, None, None, None] for c in (config.latents_mean, config.latents_std))
        x, frames = self.vae.post_quant_conv(latents.transpose(1, 2).to(**like) * std + mean), []
        for frame in x.split(1, 2):
            frames.append(self.vae.decoder(frame, feat_cache=self._features, feat_idx=[0], first_chunk=self._first))
            self._first = False
        out = torch.cat(frames, 2)
        if config.patch_size is not None:
            from diffusers.models.autoencoders.autoencoder_kl_wan import unpatchify

            out = unpatchify(out, patch_size=config.patch_size)
        return out.clamp(-1, 1).transpose(1, 2)


def _bring(vae: Any) -> None:
    """Offloaded by accelerate: to the device where it computes, as its own encode and decode do first."""
    hook: Any = getattr(vae, "_hf_hook", None)
    if hasattr(hook, "pre_forward"):
        hook.pre_forward(vae)


@torch.no_grad()
def encode_frames(vae: Any, frames: torch.Tensor) -> torch.Tensor:
    """Latents ``[B, F, C, h, w]`` as the transformer has them (normalised) of frames ``[B, n, 3, H, W]`` in -1..1.

    Args:
        vae: diffusers' ``AutoencoderKLWan``. frames: the first is a latent frame of its own, every 4 that follow are
            one: n = 1 + 4 * (F - 1).

    Raises:
        ValueError: another number of frames.
    """
    checks.tensor("frames", frames, 5)
    checks.shape("frames", frames, batch=None, frames=None, channels=3, height=None, width=None)
    config = vae.config
    if frames.shape[1] % config.scale_factor_temporal != 1:
        raise ValueError(f"frames must be 1 + {config.scale_factor_temporal} * n of them, got {frames.shape[1]}")
    _bring(vae)
    like = dict(device=vae.device, dtype=vae.dtype)
    mean, std = (torch.tensor(c, **like)[:, None, None, None] for c in (config.latents_mean, config.latents_std))
    latents = vae.encode(frames.transpose(1, 2).to(**like)).latent_dist.mode()
    return ((latents - mean) / std).transpose(1, 2).contiguous()


@torch.no_grad()
def encode_prompts(tokenizer: Any, encoder: Any, prompts: Sequence[str], text_len: int = 512) -> torch.Tensor:
    """Embeddings ``[B, text_len, text_dim]`` as Wan was trained on: zeros behind the end of each text.

    Args:
        tokenizer, encoder: of UMT5 (``AutoTokenizer``, ``UMT5EncoderModel``). Longer texts are cut.

    Raises:
        TypeError: one text in place of a list.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts must be a list of texts, got one text: give [prompt]")
    # Runs of white space are one space, as in Wan.
    texts = [" ".join(prompt.split()) for prompt in prompts]
    tokens = tokenizer(
        texts, padding="max_length", truncation=True, max_length=text_len, padding_side="right", return_tensors="pt"
    )
    ids, mask = tokens.input_ids.to(encoder.device), tokens.attention_mask.to(encoder.device)
    hidden = encoder(ids, attention_mask=mask).last_hidden_state
    return hidden.masked_fill(~mask.bool()[..., None], 0)
