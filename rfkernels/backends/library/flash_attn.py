"""FlashAttention 2, 3 and 4 (Dao-AILab/flash-attention), by the signatures of its release 2.8.4 and August 2026.

All read keys of any strides with a last one of 1 and int32 lengths on the device, and return the natural-log normaliser
``[B, H_q, N_q]``. 2 and 3 document that a forward pass is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .kernel import Kernel, Tensor, installed, taking


class FlashAttention2(Kernel):
    name = "flash_attn_2"
    about = "FlashAttention-2"
    pip = "flash-attn"
    generations: tuple[int, ...] = (8, 9, 10, 11, 12)

    def not_found(self) -> str | None:
        found = installed("flash_attn", "flash_attn_interface.py")
        return None if found else "flash-attn 2 is not installed (pip install flash-attn)"

    def load(self) -> Callable[..., Any]:
        from flash_attn import flash_attn_with_kvcache

        return taking(flash_attn_with_kvcache, "cache_seqlens", "return_softmax_lse")

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        result = self.function(
            q, k, v, cache_seqlens=lengths, softmax_scale=scale, causal=False, return_softmax_lse=return_lse
        )
        return (result[0], result[1]) if return_lse else (result, None)  # FlashAttention-3 returns its partial sums too


class FlashAttention3(FlashAttention2):
    name = "flash_attn_3"
    about = "FlashAttention-3"
    pip = "flash_attn_3"
    generations: tuple[int, ...] = (9,)

    def not_found(self) -> str | None:
        found = installed("flash_attn_interface")
        return None if found else "flash-attn 3 is not installed (the folder hopper/ of the flash-attention repository)"

    def load(self) -> Callable[..., Any]:
        from flash_attn_interface import flash_attn_with_kvcache

        return taking(flash_attn_with_kvcache, "cache_seqlens", "return_softmax_lse")


class FlashAttention4(Kernel):
    """Compiled at its first call, by the CuTe DSL: seconds.

    Always with lengths, so that a call before a CUDA graph is recorded compiles what the graph runs.
    """

    name = "flash_attn_4"
    about = "FlashAttention-4"
    pip = "flash-attn-4"
    generations = (9, 10, 11, 12)

    def not_found(self) -> str | None:
        found = installed("flash_attn", "cute/interface.py")
        return None if found else "flash-attn 4 is not installed (pip install flash-attn-4)"

    def load(self) -> Callable[..., Any]:
        from flash_attn.cute import flash_attn_varlen_func

        return taking(flash_attn_varlen_func, "seqused_k", "return_lse")

    def head_dims_on(self, device: torch.device) -> range:
        """Its kernel for head_dim 256 on 10.x takes no lengths."""
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        return self.head_dims if hopper else range(8, 129, 8)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if lengths is None:
            lengths = torch.full((len(k),), k.shape[1], dtype=torch.int32, device=k.device)
        out, lse = self.function(q, k, v, seqused_k=lengths, softmax_scale=scale, causal=False, return_lse=return_lse)
        return out, lse if return_lse else None
