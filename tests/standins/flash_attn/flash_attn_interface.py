"""FlashAttention 2.8.4: flash_attn/flash_attn_interface.py and csrc/flash_attn/flash_api.cpp, mha_fwd_kvcache."""

from __future__ import annotations

from . import standin


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    standin.CALLS.append("flash_attn_2")
    assert (k, v, rotary_cos, rotary_sin, cache_batch_idx, block_table) == (None,) * 6
    assert not causal and tuple(window_size) == (-1, -1)
    standin.check_inputs(q, k_cache, v_cache, largest=256)
    if cache_seqlens is not None:
        standin.check_lengths(cache_seqlens, len(q), q.device)
    lengths = None if cache_seqlens is None else cache_seqlens.tolist()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = standin.attend(q, k_cache, v_cache, lengths, scale)
    return (out, lse) if return_softmax_lse else out
