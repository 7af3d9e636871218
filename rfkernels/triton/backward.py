"""Attention backward: dQ by query tiles, dK and dV by key tiles, each entry by one program. No atomics.

Queries and keys come rotated (`cache.rotate`): queries are read once for each tile of keys. Gradients are turned back
before they are stored. Scores are recomputed from the normaliser.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..rope import RopeTables
from . import tiles
from .cache import rotate
from .forward import Keys, precision
from .grad_kv import grad_kv_kernel
from .grad_q import grad_q_kernel
from .launch import ALL_REGISTERS, FUSION, on_device, padded, pointwise_rows, rotary, rows


@triton.jit
def delta_kernel(
    OUT, GRAD_OUT, GRAD_LSE, DELTA, o_b, o_n, o_h, g_b, g_n, g_h, queries, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``DELTA [B, H, N] = sum(out * grad_out) - grad_lse``: what the sweeps subtract from ``grad_out @ v``.

    EXACT: summed in the order of that product, and without the normaliser's gradient, which the sweeps then add to
    the difference: where a row sees one key, that is exactly zero, and the normaliser's gradient all there is.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(queries, BLOCK_M)
    row = (pid % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = (pid // blocks % heads).to(tl.int64)
    sample = (pid // (blocks * heads)).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)[None, :]
    stored = row < queries
    mask = stored[:, None] & (columns < D)
    wide = row.to(tl.int64)[:, None]
    out = tl.load(OUT + sample * o_b + head * o_h + wide * o_n + columns, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(GRAD_OUT + sample * g_b + head * g_h + wide * g_n + columns, mask=mask, other=0.0).to(tl.float32)
    at = (sample * heads + head) * queries + row
    if EXACT:
        within = tl.arange(0, BLOCK_M)
        products = tl.dot(grad, tl.trans(out), input_precision="ieee")
        delta = tl.sum(tl.where(within[:, None] == within[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(out * grad, 1) - tl.load(GRAD_LSE + at, mask=stored, other=0.0)
    tl.store(DELTA + at, delta, mask=stored)


def gradients(
    grad_out: torch.Tensor,
    grad_lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    keys: Keys,
    rope: RopeTables | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients in the dtypes of q, k, v (un-rotated); of a chunk's keys only its own get any."""
    batch, queries, heads, head_dim = q.shape
    dtype, mask = keys.v.dtype, keys.mask
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if queries == 0 or k.shape[1] == 0:
        return tuple(grad.zero_() for grad in grads)
    if mask is None:
        turned = sink_turned = rotate(q, rope, dtype, num_frames=keys.num_frames)
        own_k, own_v = keys.own_k, keys.own_v
        frame_tokens = keys.frame_tokens
    else:
        first = k.shape[1] - queries
        turned = sink_turned = rotate(q, rope, dtype, first_token=first)
        if rope is not None:
            sink_turned = rotate(q, rope, dtype, first_token=first, mask=mask)
        own_k, own_v = keys.k, keys.v
        frame_tokens = 1 if rope is None else rope.frame_tokens
    out, grad_out, grad_lse = rows(out), rows(grad_out), grad_lse.contiguous()
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    rotation, block_d = rotary(rope, q), padded(head_dim)
    short = rope is not None and frame_tokens < 64
    counts = (0, 0, 1, 1, True) if mask is None else mask
    lengths = lse if keys.num_frames is None else keys.num_frames
    group, shape = heads // k.shape[2], {"D": head_dim, "BLOCK_D": block_d}

    def strides(*tensors: torch.Tensor) -> list[int]:
        return [stride for x in tensors for stride in x.stride()[:3]]

    def options(tile: tiles.Tile) -> dict:
        return shape | rotation.options | FUSION | ALL_REGISTERS | {
            "USE": keys.use, "OWN_CHUNK": counts[4], "GROUP": group, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys,
            "STAGES": tile.stages, "PRECISION": precision(dtype), "num_warps": tile.warps, "num_stages": tile.stages,
        }  # fmt: skip

    with on_device(q):
        by_rows, by_keys = (
            tiles.backward_tile(tiles.architecture(), head_dim, dtype, keys.use, of, short=short)
            for of in ("queries", "keys")
        )
        exact = dtype == torch.float32  # in half precision v is rounded far more coarsely than these sums
        delta_rows = by_rows.rows if exact else pointwise_rows(block_d)
        delta_kernel[(triton.cdiv(queries, delta_rows) * heads * batch,)](
            out, grad_out, grad_lse, delta, *strides(out, grad_out), queries, heads, **shape, BLOCK_M=delta_rows,
            EXACT=exact, num_warps=4, **FUSION,
        )  # fmt: skip
        grad_q_kernel[(triton.cdiv(queries, by_rows.rows) * heads * batch,)](
            turned, sink_turned, keys.k, keys.v, own_k, own_v, grad_out, lse, delta, grad_lse, grads[0], lengths,
            rotation.turns, rotation.spatial, *strides(turned, sink_turned, keys.k, keys.v, own_k, own_v, grad_out),
            scale, queries, k.shape[1], heads, frame_tokens, keys.capacity, *counts[:4],
            TWO_FRAMES=frame_tokens >= by_rows.rows, **options(by_rows),
        )  # fmt: skip
        grad_kv_kernel[(triton.cdiv(k.shape[1], by_keys.keys) * k.shape[2] * batch,)](
            turned, sink_turned, own_k, own_v, grad_out, lse, delta, grad_lse, grads[1], grads[2], lengths,
            rotation.turns, rotation.spatial, *strides(turned, sink_turned, own_k, own_v, grad_out), scale, queries,
            k.shape[1], k.shape[2], frame_tokens, *counts[:4], **options(by_keys),
        )  # fmt: skip
    return grads
