"""FSDP2: weights, gradients and optimiser states of a `CausalWan` spread over ranks.

torch.distributed is imported where it is used: one process needs none of it, and some builds of torch have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

import torch

from ..models.wan import CausalWan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


def shard(model: CausalWan, mesh: DeviceMesh | None = None, dtype: torch.dtype | None = None) -> CausalWan:
    """Shards a model in place, block by block; torch.distributed is initialised (torchrun).

    Args:
        mesh: of one dimension, default all ranks.
        dtype: of weights and activations within a pass, e.g. bfloat16; gradients are then reduced in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model


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
