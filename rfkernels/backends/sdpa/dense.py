"""Dense attention and its gradients by torch: the one primitive under the sdpa backend."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from ...contract.requests import accumulate_dtype

_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
_FLASH_SCHEMA = (
    f"aten::{_FLASH}(Tensor query, Tensor key, Tensor value, float dropout_p=0., bool is_causal=False, *, "
    "Tensor? attn_mask=None, float? scale=None) -> (Tensor output, Tensor logsumexp)"
)
_SCORES_IN_FLIGHT = 1 << 23  # float32 scores that a backward block may hold: 32 MB


def on_cpu(x: torch.Tensor) -> bool:
    """On the CPU reading a length is no synchronisation, and torch's flash kernel for CPUs is there."""
    return x.device.type == "cpu"


@functools.cache
def has_flash() -> bool:
    """Whether torch's flash kernel for CPUs is the one that is called here and in csrc/host/cpu.cpp.

    It is torch's own and may change or go. Then attention goes the way of other devices, by the public function, and
    the normaliser costs a second product.
    """
    op = getattr(torch.ops.aten, _FLASH, None)
    return op is not None and str(op.default._schema) == _FLASH_SCHEMA


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """q ``[B, N_q, H_q, D]`` over k, v ``[B, N_k, H_kv, D]`` of one dtype; visible: bool ``[B or 1, N_q or 1, N_k]``.

    Returns out in that dtype and lse (empty unless return_lse). A query that sees nothing gets zeros and -inf.
    """
    batch, queries, heads, _ = q.shape
    if k.shape[1] == 0 or queries == 0 or batch == 0:
        return torch.zeros_like(q), q.new_full((batch, heads, queries), -torch.inf, dtype=accumulate_dtype(q.dtype))
    bias = None
    if visible is not None:
        bias = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)[:, None]
    if on_cpu(q) and has_flash():
        out, lse = _attend_cpu(q, k, v, scale, bias)
    else:
        q_, k_, v_ = (x.transpose(1, 2) for x in (q, k, v))
        grouped = heads != k.shape[2]
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=bias, scale=scale, enable_gqa=grouped)
        out = out.transpose(1, 2)
        lse = _normaliser(q, k, scale, visible) if return_lse else q.new_empty(0, dtype=accumulate_dtype(q.dtype))
    if visible is not None:
        empty = ~visible.any(-1)
        out = torch.where(empty[:, :, None, None], 0, out)
        lse = torch.where(empty[:, None], -torch.inf, lse) if return_lse else lse
    return out.contiguous(), lse.contiguous()


def _attend_cpu(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's flash kernel for CPUs, which also returns the normaliser and takes any strides."""
    group = q.shape[2] // k.shape[2]
    if group == 1:
        out, lse = _flash(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale, bias)
        return out.transpose(1, 2), lse
    # Grouped heads: H_kv stands in for the batch, and the group's queries share its keys through a stride of zero.
    outs, lses = [], []
    for sample in range(len(q)):
        queries = q[sample].unflatten(1, (k.shape[2], group)).permute(1, 2, 0, 3)
        keys, values = (x[sample].transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
        own = None if bias is None else bias[sample if len(bias) > 1 else 0]
        out, lse = _flash(queries, keys, values, scale, own)
        outs.append(out.permute(2, 0, 1, 3).flatten(1, 2))
        lses.append(lse.flatten(0, 1))
    return torch.stack(outs), torch.stack(lses)


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if bias is not None:
        bias = bias.expand(*bias.shape[:-2], q.shape[-2], -1)
        bias = bias if bias.dim() == 4 else bias[None]
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def _score_blocks(
    q: torch.Tensor, k: torch.Tensor, scale: float, visible: torch.Tensor | None
) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """(sample, queries, scores) blocks with float32 (float64) scores ``[H_kv, G * rows, N_k]``."""
    precision = accumulate_dtype(q.dtype)
    rows = max(1, _SCORES_IN_FLIGHT // max(1, q.shape[2] * k.shape[1]))
    for sample in range(len(q)):
        keys = k[sample].to(precision).permute(1, 2, 0)
        for start in range(0, q.shape[1], rows):
            block = slice(start, min(start + rows, q.shape[1]))
            scores = _by_group(q[sample, block].to(precision), k.shape[2]) @ keys * scale
            if visible is not None:
                own = visible.expand(len(q), q.shape[1], -1)[sample, block]
                scores.unflatten(1, (-1, own.shape[0])).masked_fill_(~own, -torch.inf)
            yield sample, block, scores


def _by_group(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """``[N, H_q, D] -> [H_kv, G * N, D]``."""
    return x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _from_group(x: torch.Tensor, rows: int) -> torch.Tensor:
    """``[H_kv, G * N, D] -> [N, H_q, D]``."""
    return x.unflatten(1, (-1, rows)).permute(2, 0, 1, 3).flatten(1, 2)


def _normaliser(q: torch.Tensor, k: torch.Tensor, scale: float, visible: torch.Tensor | None) -> torch.Tensor:
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=accumulate_dtype(q.dtype))
    for sample, block, scores in _score_blocks(q, k, scale, visible):
        lse[sample, :, block] = scores.logsumexp(-1).unflatten(1, (-1, block.stop - block.start)).flatten(0, 1)
    return lse


def backward(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    visible: torch.Tensor | None = None,
    grad_keys: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `attend`, recomputed block by block from lse, in float32 (float64).

    out and lse may belong to a larger set of keys of which k, v are a part; then this is that part's share. Only the
    first ``grad_keys`` keys get a gradient (default: all).
    """
    precision, kv_heads = accumulate_dtype(q.dtype), k.shape[2]
    grad_keys = k.shape[1] if grad_keys is None else grad_keys
    grad_q = torch.empty(q.shape, dtype=precision, device=q.device)
    grad_k = torch.zeros(len(k), grad_keys, *k.shape[2:], dtype=precision, device=q.device)
    grad_v = torch.zeros_like(grad_k)
    for sample, block, scores in _score_blocks(q, k, scale, visible):
        rows = block.stop - block.start

        def part(x: torch.Tensor, sample: int = sample, block: slice = block) -> torch.Tensor:
            return _by_group(x[sample, block].to(precision), kv_heads)

        q_, out_, grad_out_ = part(q), part(out), part(grad_out)
        lse_, grad_lse_ = (
            x[sample, :, block].unflatten(0, (kv_heads, -1)).flatten(1, 2)[..., None].to(precision)
            for x in (lse, grad_lse)
        )
        # An empty row has lse = -inf and no visible key: its weights are zero.
        weights = scores.sub_(torch.where(lse_ == -torch.inf, torch.inf, lse_)).exp_()
        delta = (grad_out_ * out_).sum(-1, keepdim=True) - grad_lse_
        grad_v[sample] += (weights[..., :grad_keys].mT @ grad_out_).transpose(0, 1)
        grad_scores = (grad_out_ @ v[sample].to(precision).permute(1, 2, 0)).sub_(delta).mul_(weights).mul_(scale)
        grad_q[sample, block] = _from_group(grad_scores @ k[sample].to(precision).transpose(0, 1), rows)
        grad_k[sample] += (grad_scores[..., :grad_keys].mT @ q_).transpose(0, 1)
    return grad_q, grad_k, grad_v
