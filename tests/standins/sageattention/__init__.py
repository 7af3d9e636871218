"""SageAttention 2.2.0: sageattention/core.py, sageattn. It does not quantise here."""

from __future__ import annotations

from flash_attn import standin


def sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=None, return_lse=False, **kwargs):
    standin.CALLS.append("sage_attention")
    assert tensor_layout in ("HND", "NHD") and not is_causal and not kwargs
    if tensor_layout == "HND":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    standin.check_inputs(q, k, v, largest=128)
    out, lse = standin.attend(q, k, v, None, q.shape[-1] ** -0.5 if sm_scale is None else sm_scale)
    if tensor_layout == "HND":
        out = out.transpose(1, 2)
    return (out, lse) if return_lse else out
