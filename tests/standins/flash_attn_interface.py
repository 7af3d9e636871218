"""FlashAttention 3: hopper/flash_attn_interface.py and hopper/flash_api.cpp, mha_fwd, as of August 2026."""

from __future__ import annotations

from flash_attn import standin


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, qv=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, page_table=None, cu_seqlens_q=None, cu_seqlens_k_new=None,
    max_seqlen_q=None, rotary_seqlens=None, q_descale=None, k_descale=None, v_descale=None, softmax_scale=None,
    causal=False, window_size=(-1, -1), attention_chunk=0, softcap=0.0, rotary_interleaved=True,
    scheduler_metadata=None, num_splits=0, pack_gqa=None, sm_margin=0, return_softmax_lse=False,
):  # fmt: skip
    standin.CALLS.append("flash_attn_3")
    assert (k, v, qv, page_table, cu_seqlens_q) == (None,) * 5 and not causal and tuple(window_size) == (-1, -1)
    standin.check_inputs(q, k_cache, v_cache, largest=256)
    if cache_seqlens is not None:
        standin.check_lengths(cache_seqlens, len(q), q.device)
    lengths = None if cache_seqlens is None else cache_seqlens.tolist()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = standin.attend(q, k_cache, v_cache, lengths, scale)
    empty = out.new_empty(0)
    return (out, lse, empty, empty) if return_softmax_lse else out
