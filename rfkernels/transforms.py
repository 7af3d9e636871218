"""Forward-mode derivatives and the transforms of torch.func, which an op with a backward formula alone does not serve.

torch would give an op without a forward formula a tangent of zeros, silently. Such a call is made of plain torch
operations instead (the reference backend's functions, which torch differentiates every way), or refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from . import backends


def in_func() -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def active(*tensors: torch.Tensor) -> bool:
    """Whether the call must be made of plain torch operations."""
    if torch.compiler.is_compiling():
        return False
    if in_func():
        return True
    return forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def run(operation: str, request: tuple[Any, ...], backend: str, device: torch.device) -> Any:
    """The operation by the reference's functions, outside autocast, where the chosen backend is a torch one.

    Raises:
        UnservedError: a backend of kernels was named or chosen.
    """
    if backend not in ("reference", "sdpa"):
        raise backends.UnservedError(
            f"backend {backend!r} cannot do this: {operation} has forward-mode derivatives, and works within "
            'torch.func, in plain torch operations only: give backend="reference"'
        )
    with torch.autocast(device.type, enabled=False):
        return getattr(backends.reference, operation)(request)
