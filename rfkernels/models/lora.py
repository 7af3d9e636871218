"""LoRA from the files that trainers and other programs write, put into a model by PEFT."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import checks
from .checkpoints import Model
from .reading import described, own_names, read_tensors
from .wrappers import is_sharded, plain_name, unwrapped

_KNOWN = ("generator_lora", "lora", "state_dict")
_KOHYA = "lora_unet_"  # before names in which dots have become underscores
_PARTS = {"lora_down": "A", "lora_up": "B", "lora_A": "A", "lora_B": "B"}
_CONFIG = "adapter_config.json"


class _Layer(NamedTuple):
    """The LoRA of one layer: ``weight + scaling * B @ A``."""

    a: torch.Tensor  # [rank, in, ...]
    b: torch.Tensor  # [out, rank, ...]
    scaling: float


def load_lora(
    model: Model,
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    strength: float = 1.0,
    adapter: str = "default",
) -> Model:
    """Puts a LoRA into ``model``, all or nothing, by PEFT: what it applies to stays as it was.

    Several add up, under names of their own. As PEFT has it, the LoRA's weights train and the others are frozen.
    `save_checkpoint` writes the model with them merged.

    Args:
        model: a `CausalWan`, or diffusers' ``WanTransformer3DModel``, whose own methods know of the LoRA then.
        path: a ``.pt`` with LongLive's ``generator_lora``, or with a LoRA's state dict; a ``.safetensors`` file, or
            PEFT's folder with ``adapter_config.json``. Keys are PEFT's (``lora_A``, ``lora_B``), ComfyUI's
            (``diffusion_model.``, also ``lora_down``, ``lora_up``, ``alpha``), those with underscores for dots
            (``lora_unet_``), or diffusers' names.
        alpha: the update is scaled by alpha / rank. Default: what the file or folder says, else the rank, as in
            LongLive's configurations.
        strength: a further factor.
        adapter: its name in the model.

    Returns:
        the model.

    Raises:
        ImportError: peft is not installed. FileNotFoundError. ValueError: a file without a LoRA; keys that are no plain
            LoRA (DoRA, LoKr, differences of whole weights), or of layers that the model lacks, or of another shape, all
            listed; an alpha that the file contradicts; a name that is taken. The model is unchanged then.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("load_lora needs peft: pip install peft") from error
    inner: Any = unwrapped("model", model)
    inner = getattr(inner, "_orig_mod", inner)
    checks.number("strength", strength, -math.inf, math.inf)
    if adapter in getattr(inner, "peft_config", {}):
        raise ValueError(f"adapter must be a new name, the model has {sorted(inner.peft_config)}, got {adapter!r}")
    path = Path(path)
    layers = _layers(_read(path), _own_layers(inner), _settings(path), alpha, path)
    config = peft.LoraConfig(
        r=1,
        target_modules=list(layers),
        rank_pattern={name: layer.a.shape[0] for name, layer in layers.items()},
        # PEFT divides by the rank.
        alpha_pattern={name: layer.scaling * strength * layer.a.shape[0] for name, layer in layers.items()},
    )
    before = _active(inner)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are meant
        peft.inject_adapter_in_model(config, inner, adapter)
    state = {
        f"{name}.lora_{part}.weight": x
        for name, layer in layers.items()
        for part, x in zip("AB", layer[:2], strict=True)
    }
    peft.set_peft_model_state_dict(inner, state, adapter)
    for module in _adapted(inner):  # PEFT leaves the newest alone in force
        module.set_adapter([name for name in (*before, adapter) if name in module.lora_A])
    if hasattr(inner, "_hf_peft_config_loaded"):  # what diffusers asks before it scales, fuses or disables one
        inner._hf_peft_config_loaded = True
    return model


def _adapted(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "lora_A") and hasattr(module, "active_adapters")]


def _active(model: nn.Module) -> list[str]:
    """The adapters in force."""
    found: dict[str, None] = {}
    for layer in _adapted(model):
        found |= dict.fromkeys(layer.active_adapters)
    return list(found)


def _own_layers(model: nn.Module) -> dict[str, tuple[str, torch.Tensor]]:
    """Of each layer that a LoRA may be put around its own name in Wan, its name in ``model``, and its weight."""
    found = {}
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)
        if isinstance(base, nn.Linear | nn.Conv3d) and not {"base_layer", "lora_A", "lora_B"} & set(name.split(".")):
            if base.weight.is_meta or is_sharded(base.weight):
                where = "on the meta device" if base.weight.is_meta else "sharded"
                raise ValueError(f"model must hold its weights whole, got {name}.weight {where}: load LoRAs first")
            found[f"{plain_name(name)}.weight"] = (name, base.weight)
    return {name.removesuffix(".weight"): layer for name, layer in own_names(found).items()}


def _read(path: Path) -> dict[str, torch.Tensor]:
    if path.is_dir():
        found = [path / f"adapter_model.{kind}" for kind in ("safetensors", "bin")]
        file = next((file for file in found if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} must hold PEFT's {found[0].name} or {found[1].name}")
        path = file
    return read_tensors(path, None, _KNOWN)


def _settings(path: Path) -> dict[str, Any]:
    """PEFT's configuration beside the weights."""
    file = path / _CONFIG if path.is_dir() else path.parent / _CONFIG
    belongs = path.is_dir() or path.name.startswith("adapter_model.")
    given = json.loads(file.read_text()) if belongs and file.is_file() else {}
    found = [key for key in ("use_dora", "lora_bias", "modules_to_save", "use_qalora") if given.get(key)]
    if given.get("peft_type", "LORA") != "LORA" or found:
        raise ValueError(f"{file} must be of a plain LoRA, got {', '.join(found) or given['peft_type']}")
    return given


def _layers(
    state: dict[str, torch.Tensor],
    own: dict[str, tuple[str, torch.Tensor]],
    settings: dict[str, Any],
    alpha: float | None,
    path: Path,
) -> dict[str, _Layer]:
    """The LoRA by the model's names of its layers, checked."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    underscored = {name.replace(".", "_"): name for name in own}
    problems: dict[str, list[str]] = {"no part of a plain LoRA": [], "of no layer of this model": [], "incomplete": []}
    for key, x in own_names(_dotted(state, underscored)).items():
        match = re.fullmatch(r"(.+)\.(?:(lora_down|lora_up|lora_A|lora_B)(?:\.[^.]+)?\.weight|(alpha))", key)
        if match is None:
            problems["no part of a plain LoRA"].append(key)
        elif match[1] not in own:
            problems["of no layer of this model"].append(key)
        else:
            found.setdefault(match[1], {})[_PARTS.get(match[2], "alpha")] = x
    layers, stated = {}, settings.get("alpha_pattern") or {}
    for name, parts in found.items():
        if not {"A", "B"} <= set(parts):
            problems["incomplete"].append(f"{name} has {', '.join(sorted(parts))} alone")
            continue
        a, b, weight = parts["A"], parts["B"], own[name][1]
        if (b.shape[0], a.shape[0], a[0].numel()) != (weight.shape[0], b.shape[1], weight[0].numel()):
            problems.setdefault("of another shape", []).append(
                f"{name}: {tuple(b.shape)} @ {tuple(a.shape)} in the file, {tuple(weight.shape)} in the model"
            )
            continue
        rank = a.shape[0]
        says = parts.get("alpha", _by_pattern(stated, name, settings.get("lora_alpha")))
        says = None if says is None else float(says)
        if alpha is not None and says is not None and not math.isclose(alpha, says, rel_tol=1e-3):
            raise ValueError(f"alpha must be what {path} says, {says:g} for {name}, or None, got {alpha:g}")
        value = next((x for x in (alpha, says) if x is not None), rank)
        layers[own[name][0]] = _Layer(a, b, value / (math.sqrt(rank) if settings.get("use_rslora") else rank))
    if any(problems.values()) or not layers:
        raise ValueError(described(f"{path} must hold a LoRA of this model's layers", problems))
    return layers


def _dotted(state: dict[str, torch.Tensor], underscored: dict[str, str]) -> dict[str, torch.Tensor]:
    """Keys with underscores for dots under the model's own names; others as they are."""
    result = {}
    for key, x in state.items():
        layer, dot, rest = key.removeprefix(_KOHYA).partition(".")
        result[f"{underscored.get(layer, layer)}{dot}{rest}" if key.startswith(_KOHYA) else key] = x
    return result


def _by_pattern(patterns: dict[str, float], name: str, default: float | None) -> float | None:
    """PEFT's rule: a pattern is a regular expression of the end of a name."""
    return next((x for pattern, x in patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", name)), default)
