"""FSDP2: weights, gradients and optimiser states of a `CausalWan` spread over ranks.

torch.distributed is imported where it is used: one process needs none of it, and some builds of torch have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..models.wan import CausalWan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(model: CausalWan, mesh: DeviceMesh | None = None, dtype: torch.dtype | None = None) -> CausalWan:
    """Shards a model in place, block by block; torch.distributed is initialised (torchrun).

    Args:
        mesh: of one dimension, default all ranks.
        dtype: of weights and activations within a pass, e.g. bfloat16; gradients are then reduced in float32.

    Returns:
        the model. Errors are those of torch's ``fully_shard``: without torch.distributed, for example.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return model
