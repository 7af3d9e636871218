"""What a saved state of a cache must look like."""

from __future__ import annotations

from typing import Any

import torch

from . import checks


def checked(
    state: dict[str, Any], tensors: dict[str, torch.Tensor], description: dict[str, Any], most_open: int
) -> tuple[list[int], int]:
    """The ages and open frames of a `EMASinkCache.state_dict` that fits a cache of these tensors and description.

    Raises:
        ValueError: a missing or unexpected entry, another geometry, shape or dtype.
    """
    names = set(tensors) | {"ages", "open_frames", "geometry"}
    if set(state) != names:
        raise ValueError(f"state must have the entries {sorted(names)}, got {sorted(state)}")
    for key, value in description.items():
        if state["geometry"].get(key) != value:
            raise ValueError(f"state has {key}={state['geometry'].get(key)!r}, this cache has {value!r}")
    for name, x in tensors.items():
        given = state[name]
        if not isinstance(given, torch.Tensor) or given.shape != x.shape or given.dtype != x.dtype:
            got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, torch.Tensor) else repr(given)
            raise ValueError(f"state[{name!r}] must be {x.dtype} {tuple(x.shape)}, got {got}")
    ages, frames, streams = state["ages"], state["open_frames"], len(tensors["num_frames"])
    checks.integer("state['open_frames']", frames, 0, most_open)
    if len(ages) != streams:
        raise ValueError(f"state['ages'] must have {streams} entries, got {len(ages)}")
    return [checks.integer("state['ages']", age, 0) for age in ages], frames
