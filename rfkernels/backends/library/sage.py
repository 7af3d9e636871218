"""SageAttention 2 (thu-ml/SageAttention), by the signature of its release 2.2.0: int8 scores, half or fp8 values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .kernel import Kernel, Tensor, installed, taking


class SageAttention(Kernel):
    """It takes no lengths, so that it attends once a window is full; before that our kernels do."""

    name = "sage_attention"
    about = "SageAttention"
    pip = "sageattention"
    generations = (8, 9, 12)
    head_dims = range(8, 129, 8)
    quantises = True

    def not_found(self) -> str | None:
        found = installed("sageattention")
        return None if found else "SageAttention is not installed (pip install sageattention==2.2.0)"

    def load(self) -> Callable[..., Any]:
        from sageattention import sageattn

        return taking(sageattn, "sm_scale", "return_lse")  # not version 1

    def takes_lengths(self, device: torch.device) -> bool:
        return False

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        result = self.function(q, k, v, tensor_layout="NHD", is_causal=False, sm_scale=scale, return_lse=return_lse)
        return (result[0], result[1]) if return_lse else (result, None)
