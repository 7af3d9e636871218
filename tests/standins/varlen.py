"""torch 2.14: torch/nn/attention/varlen.py, varlen_attn, and mha_varlen_fwd of its flash kernel."""

from __future__ import annotations

import torch
from flash_attn import standin


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    standin.CALLS.append("torch_varlen")
    batch = len(cu_seq_q) - 1
    for cumulative in (cu_seq_q, cu_seq_k):
        assert cumulative.dtype == torch.int32 and cumulative.is_contiguous() and cumulative.shape == (batch + 1,)
    standin.check_lengths(seqused_k, batch, query.device)
    assert enable_gqa or query.size(1) == key.size(1)
    assert query.dim() == key.dim() == value.dim() == 3 and block_table is None
    assert key.untyped_storage().nbytes() >= key.element_size() * (
        key.storage_offset() + 1 + sum((n - 1) * s for n, s in zip(key.shape, key.stride(), strict=True))
    ), "beyond the cache"
    standin.check_inputs(query[None], key[None], value[None], largest=256)
    starts, ends, first = cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), cu_seq_k.tolist()
    outs, lses = [], []
    for b, count in enumerate(seqused_k.tolist()):
        assert ends[b] - starts[b] <= max_q and count <= max_k and first[b] + count <= first[b + 1]
        keys = slice(first[b], first[b] + count)
        scale_ = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = standin.attend(query[None, starts[b] : ends[b]], key[None, keys], value[None, keys], None, scale_)
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, 1)
    return (out, lse) if return_aux is not None and return_aux.lse else out
