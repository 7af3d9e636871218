"""What the stand-ins share: the checks, and attention to a prefix, in float64."""

from __future__ import annotations

import torch

CALLS: list[str] = []  # of the stand-ins' functions, by package


def check_inputs(q, k, v, largest, alignment=8):
    """Four dimensions ``[B, N, H, D]``, one half dtype, a unit last stride, aligned rows."""
    assert q.dtype in (torch.float16, torch.bfloat16), "only fp16 and bf16"
    assert k.dtype == q.dtype and v.dtype == q.dtype, "query, key and value must have the same dtype"
    assert k.shape == v.shape and q.shape[0] == k.shape[0] and q.shape[-1] == k.shape[-1]
    assert q.shape[2] % k.shape[2] == 0, "heads of keys must divide heads of queries"
    assert q.shape[-1] <= largest and q.shape[-1] % alignment == 0
    for x in (q, k, v):
        assert x.stride(-1) == 1, "must have contiguous last dimension"
        assert all(stride % alignment == 0 for stride in x.stride()[:-1]) and x.data_ptr() % 16 == 0, "rows not aligned"


def check_lengths(lengths, batch, device):
    assert isinstance(lengths, torch.Tensor) and lengths.dtype == torch.int32, "lengths must have dtype int32"
    assert lengths.shape == (batch,) and lengths.is_contiguous() and lengths.device == device


def attend(q, k, v, lengths, scale):
    """out in q's dtype and the normaliser, float32 ``[B, H_q, N_q]``; lengths: a list, or None."""
    assert scale > 0
    outs, lses = [], []
    for b in range(len(q)):
        n = k.shape[1] if lengths is None else lengths[b]
        assert 0 <= n <= k.shape[1]
        keys, values = (x[b, :n].double().repeat_interleave(q.shape[2] // k.shape[2], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[b].double(), keys) * scale
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
        lses.append(scores.logsumexp(-1) if n else scores.new_full(scores.shape[:2], torch.inf))  # as FlashAttention-2
    return torch.stack(outs).to(q.dtype), torch.stack(lses).float()
