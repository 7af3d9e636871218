"""The text encoder and the VAE of an original Wan folder, as transformers' and diffusers' classes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from .reading import SHOWN, unpickled

TEXT_ENCODER, VAE, TOKENIZER = "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.1_VAE.pth", "google/umt5-xxl"

# Wan's names of an encoder's weights, and transformers'.
_TO_UMT5 = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.",
     r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)  # fmt: skip


def text_encoder(file: str | os.PathLike[str], dtype: torch.dtype) -> Any:
    """transformers' ``UMT5EncoderModel`` with the weights of ``models_t5_umt5-xxl-enc-bf16.pth``; they tell the
    sizes.

    Raises:
        ValueError: another file.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    state = _tensors(Path(file), "token_embedding.weight", "an original Wan text encoder")
    for pattern, name in _TO_UMT5:
        state = {re.sub(pattern, name, key): x for key, x in state.items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    first = "encoder.block.0.layer."
    try:
        (vocabulary, width), (inner, _) = state["shared.weight"].shape, state[f"{first}0.SelfAttention.q.weight"].shape
        buckets, heads = state[f"{first}0.SelfAttention.relative_attention_bias.weight"].shape
        hidden = len(state[f"{first}1.DenseReluDense.wi_0.weight"])
    except KeyError as error:
        raise ValueError(f"{file} must be an original Wan text encoder, it lacks {error}") from error
    layers = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.block."))
    config = UMT5Config(
        vocab_size=vocabulary, d_model=width, d_kv=inner // heads, d_ff=hidden, num_layers=layers, num_heads=heads,
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-6,
    )  # fmt: skip
    with torch.device("meta"):
        model: Any = UMT5EncoderModel(config)
    _assign(model, state, file)
    model.tie_weights()
    model = model.to(dtype)
    if dtype == torch.float16:  # whose range the last product of a feed-forward leaves: as transformers keeps it
        for name, module in model.named_modules():
            if name.endswith(".wo"):
                module.float()
    return model.eval()


def vae(file: str | os.PathLike[str]) -> Any:
    """diffusers' ``AutoencoderKLWan`` in float32 with the weights of ``Wan2.1_VAE.pth``.

    Raises:
        ValueError: another file, Wan 2.2's VAE among them.
    """
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    state = _tensors(Path(file), "encoder.conv1.weight", "Wan 2.1's VAE")
    width, colours = state["encoder.conv1.weight"].shape[:2]
    if colours != 3 or any(".downsamples.0.downsamples." in key for key in state):
        raise ValueError(
            f"{file} must be Wan 2.1's VAE, got another (Wan 2.2's?): give the vae folder of a diffusers pipeline"
        )
    converted = convert_wan_vae_to_diffusers(state)
    with torch.device("meta"):
        model: Any = AutoencoderKLWan(base_dim=width, z_dim=len(state["conv2.weight"]))
    _assign(model, converted, file)
    return model.float().eval()


def _tensors(file: Path, key: str, what: str) -> dict[str, torch.Tensor]:
    state = unpickled(file)
    if not isinstance(state, dict) or key not in state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        held = sorted(map(str, state))[:SHOWN] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{file} must be {what}, a state dict with {key}, got {held}")
    return state


def _assign(model: torch.nn.Module, state: dict[str, torch.Tensor], file: object) -> None:
    """Makes ``state`` the weights of a model on the meta device."""
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {type(model).__name__}: {error}") from error
    away = [name for name, x in model.named_buffers() if x.is_meta]
    if away:
        raise ValueError(f"{type(model).__name__} has buffers that are in no file: {', '.join(away[:SHOWN])}")
