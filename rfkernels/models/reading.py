"""State dicts from the files that people have, under Wan's own names, memory-mapped."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file

from .wrappers import plain_name

Named = TypeVar("Named")

# diffusers' names, and ours. Its norm2 is Wan's norm3, which is the only norm of a block that has weights.
_FROM_DIFFUSERS = (
    (r"^condition_embedder\.(time|text)_embedder\.linear_1\.", r"\1_embedding.0."),
    (r"^condition_embedder\.(time|text)_embedder\.linear_2\.", r"\1_embedding.2."),
    (r"^condition_embedder\.time_proj\.", "time_projection.1."),
    (r"^proj_out\.", "head.head."),
    (r"^scale_shift_table$", "head.modulation"),
    (r"\.scale_shift_table$", ".modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_out\.0\.", ".o."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.norm2\.", ".norm3."),
    (r"\.ffn\.net\.0\.proj\.", ".ffn.0."),
    (r"\.ffn\.net\.2\.", ".ffn.2."),
)
_HOLDERS = ("model.", "diffusion_model.", "transformer.")  # before the names: of trainers, ComfyUI, diffusers' LoRA
_KNOWN = ("generator_ema", "generator", "model", "state_dict")  # under which trainers keep the weights
SHOWN = 12  # names of each kind that an error spells out


def described(what: str, problems: dict[str, list[str]]) -> str:
    """An error's text: what is wrong, and a line for each kind of problem with its first names."""
    lines = [what]
    for kind, names in problems.items():
        if names:
            rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines.append(f"{len(names)} {kind}: {', '.join(names[:SHOWN])}{rest}")
    return "\n  ".join(lines)


# What stands beside a quantised weight, in ComfyUI's older and newer files and LightX2V's. Scales of activations are of
# no use to weights that are multiplied out.
_WEIGHT_SCALES = (".scale_weight", ".weight_scale")
_INPUT_SCALES = (".scale_input", ".input_scale")
_MARK, _FORMAT = "scaled_fp8", ".comfy_quant"
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def read_checkpoint(path: str | os.PathLike[str], weights: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint under Wan's own names, memory-mapped; arguments as in `load_checkpoint`. Weights in
    fp8 are as they are in the file, with their scales: see `dequantised`."""
    path = Path(path)
    state = read_tensors(weights_folder(path) if path.is_dir() else path, weights, _KNOWN)
    return own_names(state)


def read_tensors(path: Path, weights: str | None, known: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """A state dict under the file's names, of a folder or a file.

    known: the names under which a pickled file may hold it, the first that is there first.
    """
    if path.is_dir():
        state = _read_folder(path)
    elif not path.is_file():
        raise FileNotFoundError(f"path must be a folder or a file of weights, there is no {path}")
    elif path.suffix == ".safetensors":
        state = load_file(path)
    else:
        return _unwrap(unpickled(path), weights, path, known)
    if weights is not None:
        raise ValueError(f"weights must be None for {path}, which holds one state dict, got {weights!r}")
    return state


def unpickled(path: Path) -> Any:
    """What ``torch.save`` wrote: tensors, plain containers and an argparse namespace, which trainers keep beside the
    weights; mapped, unless it is of the old format (before torch 1.6), which has to be read.

    Raises:
        ValueError: other objects, by name; no such file.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, EOFError) as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it also holds {found[1]}" if found else str(error).partition("\n")[0]
        raise ValueError(
            f"{path} must be a file of torch.save with tensors, plain containers and argparse namespaces: {reason}. "
            "Where you trust it, load it with weights_only=False and save its state dict alone"
        ) from error


def own_names(state: dict[str, Named]) -> dict[str, Named]:
    """``state`` under Wan's own names, without those of wrappers and of what held the model."""
    state = {_without_holders(key): tensor for key, tensor in state.items()}
    if any(name.startswith("condition_embedder.") or ".attn1." in name or ".attn2." in name for name in state):
        for pattern, name in _FROM_DIFFUSERS:
            state = {re.sub(pattern, name, key): tensor for key, tensor in state.items()}
    return state


def _without_holders(key: str) -> str:
    name = plain_name(key)
    while holder := next((h for h in _HOLDERS if name.startswith(h)), None):
        name = plain_name(name.removeprefix(holder))
    return name


def is_lora(names: Iterable[str]) -> bool:
    """Whether these are the names of a LoRA and nothing else."""
    return all(re.search(r"\.(lora_|alpha$)", name) for name in names)


# --- fp8 --------------------------------------------------------------------------------------------------------------


def dequantised(
    state: dict[str, torch.Tensor], dtypes: dict[str, torch.dtype] | torch.dtype | None, path: object
) -> dict[str, torch.Tensor]:
    """``state`` with fp8 weights multiplied by their scales, in float32, then rounded; others are as they were.

    dtypes: of the result, by name, or one for all; None: that of the patch embedding if it is not fp8 itself, else
        bfloat16.

    Raises:
        ValueError: another quantisation, naming the tensor.
    """
    scales = {name: _scale(name, state) for name, x in state.items() if x.dtype in _FP8 and name != _MARK}
    beside = {_MARK, *(base + end for base in _bases(scales) for end in (*_WEIGHT_SCALES, *_INPUT_SCALES, _FORMAT))}
    _refuse_other_formats(state, beside, path)
    if dtypes is None:
        patches = state.get("patch_embedding.weight")
        dtypes = torch.bfloat16 if patches is None or patches.dtype in _FP8 else patches.dtype
    result = {}
    for name, x in state.items():
        if name in scales:
            dtype = dtypes if isinstance(dtypes, torch.dtype) else dtypes.get(name, torch.float32)
            x, scale = x.float(), scales[name]
            if scale is not None:
                if scale.numel() != 1 and scale.numel() != x.shape[0]:
                    raise ValueError(
                        f"{path} must have one scale for a weight or one for each row, {name} {tuple(x.shape)} has "
                        f"{tuple(scale.shape)}"
                    )
                x = x * scale.float().view(-1, *[1] * (x.dim() - 1))
            x = x.to(dtype)
        elif name in beside:
            continue
        result[name] = x
    return result


def _bases(names: Iterable[str]) -> list[str]:
    return [name.removesuffix(".weight") for name in names]


def _scale(name: str, state: dict[str, torch.Tensor]) -> torch.Tensor | None:
    base = name.removesuffix(".weight")
    return next((state[base + end] for end in _WEIGHT_SCALES if base + end in state), None)


def _refuse_other_formats(state: dict[str, torch.Tensor], beside: set[str], path: object) -> None:
    """Raises on quantised weights that are no fp8, or fp8 of which more would have to be known than ``beside``."""
    allowed = f"{path} must hold weights in fp8 with a scale each, or unquantised"
    for name, x in state.items():
        if name.endswith(_FORMAT):
            kind = json.loads(bytes(x.tolist()).decode()).get("format")
            if kind not in ("float8_e4m3fn", "float8_e5m2"):
                raise ValueError(f"{allowed}: {name} says {kind!r}")
        elif name.endswith(".weight") and not x.is_floating_point():
            raise ValueError(f"{allowed}: {name} is in {x.dtype}")
        elif re.search(r"\.(scale_weight|weight_scale(_2|_inv)?)$", name) and name not in beside:
            raise ValueError(f"{allowed}: got {name}, which is of another format or has no weight beside it")


# --- folders and pickles ----------------------------------------------------------------------------------------------


def weights_folder(folder: Path) -> Path:
    """The transformer's folder in that of a pipeline, or ``folder``."""
    if not folder.is_dir():
        raise FileNotFoundError(f"path must be a folder, there is no {folder}")
    nested = folder / "transformer"
    if (folder / "transformer_2").is_dir():
        raise ValueError(
            f"path must be of one model, {folder} holds two, for high and for low noise: give {nested} or {nested}_2"
        )
    return nested if nested.is_dir() else folder


def _read_folder(folder: Path) -> dict[str, torch.Tensor]:
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if indices:
        names = sorted(set(json.loads(indices[0].read_text())["weight_map"].values()))
    else:
        names = [file.name for file in sorted(folder.glob("*.safetensors"))]
        if len(names) != 1:
            raise FileNotFoundError(f"{folder} must hold one .safetensors file, or several with an index, got {names}")
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise FileNotFoundError(f"{folder} lacks the shards {', '.join(lacking)}")
    state: dict[str, torch.Tensor] = {}
    for name in names:
        state |= load_file(folder / name)
    return state


def _unwrap(state: Any, weights: str | None, path: Path, known: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The state dict in what a trainer pickled: itself, or under a name."""
    if weights is not None and not (isinstance(state, dict) and isinstance(state.get(weights), dict)):
        held = [str(name) for name, x in state.items() if isinstance(x, dict)] if isinstance(state, dict) else []
        allowed = (
            f"one of those in {path}: {sorted(held)[:SHOWN]}"
            if held
            else f"None for {path}, which is flat: it holds one state dict, not several by name"
        )
        raise ValueError(f"weights must be {allowed}, got {weights!r}")
    while isinstance(state, dict):
        name = weights or next((name for name in known if isinstance(state.get(name), dict)), None)
        if name is None:
            break
        state, weights = state[name], None
    if not isinstance(state, dict) or not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        entries = sorted(map(str, state))[:SHOWN] if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{path} must hold a state dict, or one as {' or '.join(known[:2])}, got {entries}")
    return state
