"""What others put around a model or its parts: torch.compile, DDP, FSDP, activation checkpointing, LoRA.

Names of weights are always the plain model's, whatever is wrapped where, so that files of one load into the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# What holds the wrapped module, in each kind of wrapper; a part of the name of every weight within.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module")
_PEFT = "base_model.model."  # of peft's PeftModel around the whole


def plain_name(name: str) -> str:
    """A weight's name without those of wrappers, wherever and however often they stand in it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS).removeprefix(_PEFT)


def unwrapped(name: str, model: Any) -> Any:
    """``model``, or what is within wrappers that hide its attributes (DDP). One that shows them (torch.compile, peft)
    stays, so that calls go through it.

    Raises:
        TypeError: there is no `CausalWan` within, naming the argument ``name``.
    """
    inner = model
    while not hasattr(inner, "config"):
        held = [inner._modules[w] for w in _WRAPPERS if w in inner._modules] if isinstance(inner, nn.Module) else []
        if not held:
            raise TypeError(
                f"{name} must be a CausalWan, or one within torch.compile or DDP, got {type(model).__name__}"
            )
        inner = held[0]
    return inner


# --- sharded weights --------------------------------------------------------------------------------------------------


def is_sharded(x: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether x is a DTensor, asked without importing that."""
    return hasattr(x, "full_tensor")


def full(x: torch.Tensor) -> torch.Tensor:
    """x, gathered where it is sharded."""
    return x.full_tensor() if is_sharded(x) else x


def sharded_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A copy of x in the dtype, on the device and, if it is sharded, with the placement of ``like``."""
    if not is_sharded(like):
        return x.to(like, copy=True)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements)


# --- adapters ---------------------------------------------------------------------------------------------------------


def own_keys(model: nn.Module) -> dict[str, str]:
    """Of each weight of the plain model its name, and its key in ``model.state_dict()``; adapters have none."""
    found = {}
    for key in model.state_dict():
        parts = plain_name(key).split(".")
        if not any(part == "modules_to_save" or part.startswith("lora_") for part in parts):
            found[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = key
    return found


def adapters(model: nn.Module) -> Iterator[tuple[str, dict[str, float]]]:
    """Of each layer that peft has put a LoRA around: its plain name, and the scale of each LoRA in force.

    Raises:
        ValueError: another adapter than a plain LoRA, whose weights cannot be merged here.
    """
    for name, module in model.named_modules():
        if "base_layer" not in module._modules:
            continue
        layer: Any = module
        extra = {key.split(".")[0] for key in layer.state_dict()} - {"base_layer", "lora_A", "lora_B"}
        biased = any(getattr(lora, "bias", None) is not None for lora in getattr(layer, "lora_B", {}).values())
        if extra or biased or not hasattr(layer, "scaling"):
            kind = ", ".join(sorted(extra)) or ("lora_bias" if biased else type(layer).__name__)
            raise ValueError(f"{plain_name(name)} must have a plain LoRA, which can be merged for saving, got {kind}")
        active = [] if layer.merged or layer.disable_adapters else layer.active_adapters
        yield plain_name(name), {a: layer.scaling[a] for a in active if a in layer.lora_A}


def plain_state(model: nn.Module, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The plain model's weights, with LoRA merged, of a ``state`` of ``model`` under `plain_name`.

    Raises:
        ValueError: as `adapters`.
    """
    state = dict(state)
    for name, scales in adapters(model):
        weight = state[f"{name}.base_layer.weight"]
        for adapter, scale in scales.items():
            a, b = (state[f"{name}.lora_{x}.{adapter}.weight"].to(torch.promote_types(weight.dtype, torch.float32))
                    for x in "AB")  # fmt: skip
            weight = (weight + scale * (b.flatten(1) @ a.flatten(1)).view(weight.shape)).to(weight.dtype)
        state[f"{name}.base_layer.weight"] = weight
    for name, module in model.named_modules():
        if "modules_to_save" in module._modules and "original_module" in module._modules:
            layer: Any = module
            for adapter in [] if layer.disable_adapters else layer.active_adapters:
                own, other = f"{plain_name(name)}.modules_to_save.{adapter}.", f"{plain_name(name)}.original_module."
                state |= {other + key.removeprefix(own): x for key, x in state.items() if key.startswith(own)}
    return {name: state[plain_name(key)] for name, key in own_keys(model).items()}
