"""Weights on disk: loaded into a model, all or nothing, and saved; configs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import nn

from .config import CausalWanConfig
from .reading import dequantised, described, is_lora, own_names, read_checkpoint, weights_folder
from .wan import CausalWan
from .wrappers import full, is_sharded, own_keys, plain_name, plain_state, sharded_like, unwrapped

Model = TypeVar("Model", bound=nn.Module)

_TEXT_TO_VIDEO = ("t2v", "ti2v")
# What a config has where there is another input than text: in Wan's names, diffusers', DiffSynth's and VideoX-Fun's.
_CONDITIONED = (
    "image_dim", "added_kv_proj_dim", "pos_embed_seq_len", "has_image_input", "has_image_pos_emb", "has_ref_conv",
    "add_ref_conv", "add_control_adapter", "vace_layers", "vace_in_channels", "audio_dim", "motion_encoder_dim",
)  # fmt: skip
_CHANNELS = (("in_dim", "in_channels"), ("out_dim", "out_channels"))


def load_checkpoint(
    model: Model, path: str | os.PathLike[str], *, weights: str | None = None, assign: bool = False
) -> Model:
    """Loads published or saved weights into ``model``, all or nothing.

    Args:
        model: a `CausalWan`, or diffusers' ``WanTransformer3DModel``, before it is offloaded.
        path: a folder of safetensors, whole or sharded by an index (original Wan, diffusers, `save_checkpoint`; a
            diffusers pipeline's ``transformer`` is found), or a ``.safetensors``, ``.pt``, ``.pth`` or ``.bin`` file.
            Keys may start with ``model.`` or, as in ComfyUI's files, ``model.diffusion_model.``. Pickled files are
            read with ``weights_only`` and memory-mapped, if they are not of the format before torch 1.6.
        weights: of a .pt file that holds several: "generator_ema" or "generator". Default: the first of these there is.
        assign: make the file's memory-mapped tensors the parameters, in their own dtype, instead of copying into the
            model's: for a model on the meta device. (Weights in fp8 cannot be; they come in the dtype of the patch
            embedding, or bfloat16.)

    Weights in fp8, with a scale for each weight or row or none, are dequantised (ComfyUI's ``scale_weight`` and
    ``weight_scale``, LightX2V's).

    Returns:
        the model.

    Raises:
        FileNotFoundError: no such file, or a shard missing. ValueError: missing, unexpected and mis-shaped keys, all
            listed; a file without weights, or a LoRA; other quantisations than fp8; ``weights`` of a file that holds
            one state dict. The model is unchanged then.
    """
    return _load(model, read_checkpoint(path, weights), path, assign)


def _load(model: Model, state: dict[str, torch.Tensor], path: str | os.PathLike[str], assign: bool) -> Model:
    """`load_checkpoint` for a state dict under Wan's own names, perhaps with scaled fp8 weights."""
    if is_lora(state):
        raise ValueError(f"{path} must hold a model's weights, got a LoRA: load it with load_lora(model, path)")
    keys, held = own_names(own_keys(model)), model.state_dict()
    own = {name: held[key] for name, key in keys.items()}
    state = dequantised(state, None if assign else {name: x.dtype for name, x in own.items()}, path)
    shapes = [
        f"{name}: {tuple(state[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    problems = {
        "missing": [name for name in own if name not in state],
        "unexpected": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    if any(problems.values()):
        what = f"{path} does not fit this model ({getattr(model, 'config', type(model).__name__)})"
        raise ValueError(described(what, problems))
    if not assign and any(p.is_meta for p in own.values()):
        raise ValueError("assign must be True for a model on the meta device: it has no memory to copy into")
    given = {keys[name]: sharded_like(x, own[name]) if is_sharded(own[name]) else x for name, x in state.items()}
    # What is missing now can only be adapters, which stay as they are.
    model.load_state_dict(given, strict=False, assign=assign)
    return model


def save_checkpoint(model: CausalWan, folder: str | os.PathLike[str], dtype: torch.dtype | None = None) -> None:
    """Writes ``config.json`` and ``diffusion_pytorch_model.safetensors``, Wan's own layout and names, in ``folder``.

    The weights are the plain model's, also of a compiled or wrapped one; LoRA adapters are merged in the file. Of a
    sharded model every rank calls this, and rank 0 writes.

    dtype: of the written weights, default the model's.

    Raises:
        ValueError: weights that are elsewhere (on the meta device); adapters that cannot be merged.
    """
    held = model.state_dict()
    away = [name for name, x in held.items() if x.is_meta]
    if away:
        raise ValueError(f"model must hold its weights, got {away[0]} on the meta device: take offloading off first")
    sharded = any(is_sharded(x) for x in held.values())
    state = plain_state(model, {plain_name(name): full(x.detach()) for name, x in held.items()})
    if sharded and torch.distributed.get_rank() != 0:
        return
    state = {name: tensor.to(dtype or tensor.dtype) for name, tensor in state.items()}
    save_weights(state, unwrapped("model", model).config, folder)


def save_weights(state: dict[str, torch.Tensor], config: CausalWanConfig, folder: str | os.PathLike[str]) -> None:
    """`save_checkpoint` for weights that are in no model."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = asdict(config)
    # What Wan's own loader calls them.
    sizes |= {"_class_name": "WanModel", "in_dim": sizes.pop("in_channels"), "out_dim": sizes.pop("out_channels")}
    # Written beside, then moved: an interrupted save leaves the old file.
    partial = folder / "diffusion_pytorch_model.safetensors.partial"
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial, metadata={"format": "pt"})
    os.replace(partial, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps(sizes, indent=2) + "\n")


def from_pretrained(
    path: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    weights: str | None = None,
) -> CausalWan:
    """The model that a folder with a config.json holds (original Wan, diffusers, `save_checkpoint`), without a second
    copy of its weights in memory.

    checkpoint: other weights for that config, e.g. Reward Forcing's .pt; whatever `load_checkpoint` reads, and
        ``weights`` as there.

    Raises:
        FileNotFoundError: no config.json; otherwise as `load_checkpoint`.
    """
    folder = weights_folder(Path(path))
    source = folder if checkpoint is None else checkpoint
    read_config(folder)  # what is wrong with it is said before files are read
    state = read_checkpoint(source, weights)
    with torch.device("meta"):
        model = CausalWan(read_config(folder, state))
    return _load(model, state, source, assign=True).to(device, dtype)


def read_config(folder: str | os.PathLike[str], state: Mapping[str, torch.Tensor] | None = None) -> CausalWanConfig:
    """The sizes in a folder's config.json, in Wan's or diffusers' names.

    state: the weights (`read_checkpoint`), for ``text_dim`` where the config lacks it, as original Wan's does.

    Raises:
        FileNotFoundError; ValueError: not a text-to-video Wan transformer.
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} must hold the transformer's config.json")
    text = (state or {}).get("text_embedding.0.weight")
    text_dim = text.shape[1] if text is not None and text.dim() == 2 else None
    return config_of(json.loads(file.read_text()), file, text_dim)


def config_of(given: Mapping[str, Any], what: object, text_dim: int | None = None) -> CausalWanConfig:
    """The sizes in a configuration in Wan's or diffusers' names.

    what: its file or object, for errors. text_dim: where it says none.

    Raises:
        ValueError: not a text-to-video Wan transformer.
    """
    _check_architecture(given, what)
    names = {"in_dim": "in_channels", "out_dim": "out_channels", "num_attention_heads": "num_heads"}
    sizes = {names.get(key, key): value for key, value in given.items()}
    if "attention_head_dim" in sizes:
        sizes["dim"] = sizes["num_heads"] * sizes["attention_head_dim"]
    if "dim" not in sizes:
        raise ValueError(f"{what} must describe a Wan transformer, got {given.get('_class_name', 'no dim')}")
    if "text_dim" not in sizes and text_dim is not None:
        sizes["text_dim"] = text_dim
    sizes["qk_norm"] = bool(sizes.get("qk_norm", True))
    fields = CausalWanConfig.__dataclass_fields__
    return CausalWanConfig(**{key: value for key, value in sizes.items() if key in fields})


def _check_architecture(given: Mapping[str, Any], what: object) -> None:
    """Raises unless it is of the text-to-video transformer (which Wan 2.2's "ti2v" is too): the others take more
    inputs, or have parts that this one lacks, and would be read in part without a word."""
    kind, name = given.get("model_type", "t2v"), str(given.get("_class_name", ""))
    found = [f"{key}={given[key]!r}" for key in _CONDITIONED if given.get(key)]
    if kind not in _TEXT_TO_VIDEO:
        found.insert(0, f"model_type={kind!r}")
    elif any(word in name.lower() for word in ("vace", "animate", "s2v", "i2v")):
        found.insert(0, f"_class_name={name!r}")
    channels = [next((given[key] for key in keys if key in given), 16) for keys in _CHANNELS]
    if channels[0] != channels[1]:
        found.append(f"{channels[0]} input channels for {channels[1]} output channels")
    if found:
        raise ValueError(
            f"{what} must describe a text-to-video Wan transformer, got one that is also conditioned on images or "
            f"other inputs: {', '.join(found)}"
        )
    norm, window = given.get("qk_norm", True), given.get("window_size", (-1, -1))
    if norm not in (True, False, None, "rms_norm_across_heads"):
        raise ValueError(f"{what} must have the qk_norm of Wan, 'rms_norm_across_heads' or none, got {norm!r}")
    if list(window) != [-1, -1]:
        raise ValueError(f"{what} must have window_size [-1, -1]: the window is the cache's here, got {window}")
