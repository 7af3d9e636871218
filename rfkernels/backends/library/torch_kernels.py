"""torch's own: scaled_dot_product_attention (flash, cuDNN, ... as torch chooses), and varlen_attn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ...native import torch_version
from ..sdpa import dense
from .kernel import Kernel, Tensor


class TorchSDPA(Kernel):
    """Any device, dtype and head size. It takes no lengths: read where they are on the CPU, else full windows only.

    On a GPU a normaliser costs a second product of queries and keys.
    """

    name = "torch_sdpa"
    about = "torch's scaled_dot_product_attention"
    pip = "torch"

    def not_found(self) -> str | None:
        return None

    def load(self) -> Callable[..., Any]:
        return F.scaled_dot_product_attention

    def unavailable(self, device: torch.device) -> str | None:
        return None

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        return None

    def takes_lengths(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        if lengths is None:
            return dense.attend(q, k, v, scale, return_lse=return_lse)
        counts = lengths.tolist()
        if len(set(counts)) == 1:
            return dense.attend(q, k[:, : counts[0]], v[:, : counts[0]], scale, return_lse=return_lse)
        each = [
            dense.attend(q[b, None], k[b, None, :n], v[b, None, :n], scale, return_lse=return_lse)
            for b, n in enumerate(counts)
        ]
        out, lse = (torch.cat(parts) for parts in zip(*each, strict=True))
        return out, lse


class TorchVarlen(Kernel):
    """``torch.nn.attention.varlen.varlen_attn``: torch's flash kernel or cuDNN, with ``seqused_k`` (torch >= 2.13).

    It wants all streams as one sequence of tokens. The cache is that without a copy: a stream begins a whole number of
    token strides after the one before it.
    """

    name = "torch_varlen"
    about = "torch's varlen_attn"
    pip = "torch"
    generations = (8, 9, 10, 11, 12)

    def not_found(self) -> str | None:
        if torch_version() >= (2, 13):
            return None
        return f"torch {torch.__version__} has no varlen_attn with seqused_k (from 2.13 on)"

    def load(self) -> Callable[..., Any]:
        from torch.nn.attention.varlen import varlen_attn

        return varlen_attn

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        from torch.nn.attention.varlen import AuxRequest

        batch, queries, heads, _ = q.shape
        keys, kv_heads = k.shape[1:3]
        (k, step), (v, _) = _one_sequence(k), _one_sequence(v)  # laid out alike
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        if lengths is None:
            lengths = torch.full((batch,), keys, dtype=torch.int32, device=q.device)
        out, lse = self.function(
            q.flatten(0, 1), k, v, starts * queries, starts * step, queries, keys,
            return_aux=AuxRequest(lse=True), scale=scale, enable_gqa=heads != kv_heads, seqused_k=lengths,
        )  # fmt: skip
        out = out.unflatten(0, (batch, queries))
        return out, lse.unflatten(1, (batch, queries)).transpose(0, 1) if return_lse else None


def _one_sequence(x: Tensor) -> tuple[Tensor, int]:
    """``x [B, N, H, D]`` of a cache as ``[tokens, H, D]``, and how many of those tokens lie from stream to stream.

    Between the tokens of two streams are rows of other heads, which lie in no stream's prefix.
    """
    batch, tokens, heads, head_dim = x.shape
    if batch == 1:
        return x[0], tokens
    step = x.stride(0) // x.stride(1)
    return x.as_strided(((batch - 1) * step + tokens, heads, head_dim), x.stride()[1:]), step
