"""The transformer's norms, in float32 (float64) whatever the weights are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..contract.requests import accumulate_dtype


class RMSNorm(nn.Module):
    """Over the whole width of all heads, in float32 (float64)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precision = accumulate_dtype(x.dtype)
        return F.rms_norm(x.to(precision), x.shape[-1:], self.weight.to(precision), self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """In float32 (float64)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        precision = accumulate_dtype(x.dtype)
        weight, bias = (None if p is None else p.to(precision) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(precision), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
