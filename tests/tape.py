"""A recorder in the place of CUDA graphs, for tests without a GPU: it runs the same operators on the same memory.

As a graph does, it freezes what the host decided: numbers, shapes and addresses are those of the recording, and Python
does not run again. What reads a value to the host cannot be recorded.
"""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from benchmarks.counter import ALLOCATIONS, HOST_READS, BelowOps
from rfkernels.models.graphs import Recording


class Tape(BelowOps):
    def __init__(self):
        super().__init__()
        self.steps = []

    def other(self, func, args, kwargs):
        name = func._schema.name.split("::")[1]
        if name in HOST_READS:
            raise AssertionError(f"{func} reads a device value back to the host")
        result = func(*args, **kwargs)
        if not (func.is_view or name in ALLOCATIONS):
            self.steps.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        for func, args, kwargs, result in self.steps:
            given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


class Tapes:
    """In the place of `graphs.CudaGraphs`."""

    def __init__(self, device: torch.device):
        self.recorded: list[Tape] = []

    def record(self, function) -> Recording:
        with Tape() as tape:
            out = function()
        self.recorded.append(tape)
        return Recording(tape.replay, out)
