"""Tensors whose addresses never change, said so to torch.compile."""

from __future__ import annotations

from typing import Any

import torch


def fixed(*tensors: torch.Tensor | None) -> None:
    """Marks tensors as ``torch._dynamo.mark_static_address(x, guard=False)`` does, which would import the compiler.

    CUDA graphs of ``torch.compile(mode="reduce-overhead")`` then use them where they lie, and may write into them. A
    call with tensors at other addresses, of another cache or layer, is recorded anew.
    """
    for tensor in tensors:
        if tensor is not None:
            marked: Any = tensor
            marked._dynamo_static_input_type = "unguarded"
