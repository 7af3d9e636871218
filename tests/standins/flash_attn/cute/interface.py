"""FlashAttention 4: flash_attn/cute/interface.py, flash_attn_varlen_func and _flash_attn_fwd, as of August 2026."""

from __future__ import annotations

from .. import standin


def flash_attn_varlen_func(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, min_seqlen_k=None,
    seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None, softmax_scale=None, causal=False,
    window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
    score_mod=None, score_mod_bwd=None, mask_mod=None, block_sparse_tensors=None, aux_tensors=None, aux_scalars=None,
    return_lse=False, scheduler_metadata=None, seqlen_k_per_split=None, disable_scheduler_metadata=False,
):  # fmt: skip
    standin.CALLS.append("flash_attn_4")
    assert cu_seqlens_q is None and cu_seqlens_k is None and seqused_q is None and not causal
    standin.check_inputs(q, k, v, largest=256)
    standin.check_lengths(seqused_k, len(q), q.device)  # a call without compiles another kernel
    lengths = seqused_k.tolist()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = standin.attend(q, k, v, lengths, scale)
    return out, lse if return_lse else None
