"""Attention backward: dQ by query tiles, dK and dV by key tiles, each entry by one program. No atomics.

Queries and keys come rotated (`rotation.rotate`): queries are read once for each tile of keys. Gradients are rotated
back before they are stored. Scores are recomputed from the normaliser.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...contract.requests import ChunkGradients, Cotangents, WindowGradients
from ..plan import divide_up
from . import tiles
from .attention import Prepared, prepare_chunk, prepare_window
from .grad_kv import grad_kv_kernel
from .grad_q import grad_q_kernel
from .launch import (
    ALL_REGISTERS,
    FUSION,
    addressable,
    key_values,
    mask_of,
    on_device,
    padded,
    pointwise_rows,
    rope_of,
    strided,
)
from .rotation import rotate
from .structs import Incoming
from .tiling import head_of

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit
def delta_kernel(
    out, grad_out, GRAD_LSE, DELTA, queries, heads,
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
    exist = stored[:, None] & (columns < D)
    wide = row.to(tl.int64)[:, None]
    out_rows = head_of(out, sample, head) + wide * out.token + columns
    grad_rows = head_of(grad_out, sample, head) + wide * grad_out.token + columns
    result = tl.load(out_rows, mask=exist, other=0.0).to(tl.float32)
    grad = tl.load(grad_rows, mask=exist, other=0.0).to(tl.float32)
    at = (sample * heads + head) * queries + row
    if EXACT:
        within = tl.arange(0, BLOCK_M)
        products = tl.dot(grad, tl.trans(result), input_precision="ieee")
        delta = tl.sum(tl.where(within[:, None] == within[None, :], products, 0.0), 1)
    else:
        delta = tl.sum(result * grad, 1) - tl.load(GRAD_LSE + at, mask=stored, other=0.0)
    tl.store(DELTA + at, delta, mask=stored)


def chunk_attention_backward(request: ChunkGradients) -> Gradients:
    """Gradients in the dtypes of q, k, v; of the keys and values only the chunk's own get any."""
    forward = request.forward
    grads = _empty(forward.q, forward.k, forward.v)
    if grads[0].numel() and grads[1].numel():
        prepared = prepare_chunk(forward)
        q = rotate(forward.q, forward.rope, prepared.k.dtype, num_frames=prepared.frames.seen)
        _launch(prepared._replace(q=q), None, request.cotangents, grads)
    return grads


def sink_window_attention_backward(request: WindowGradients) -> Gradients:
    """Gradients in the dtypes of q, k, v."""
    forward = request.forward
    grads = _empty(forward.q, forward.k, forward.v)
    if grads[0].numel() and grads[1].numel():
        prepared = prepare_window(forward)
        dtype, first_token = prepared.k.dtype, prepared.first_token
        q, sink_q = rotate(forward.q, forward.rope, dtype, first_token=first_token), None
        if forward.rope is not None:
            sink_q = rotate(forward.q, forward.rope, dtype, first_token=first_token, mask=forward.mask)
        _launch(prepared._replace(q=q), sink_q, request.cotangents, grads)
    return grads


def _empty(*tensors: torch.Tensor) -> Gradients:
    """For gradients, which are zeros where there are no queries or no keys and nothing is launched."""
    make = torch.zeros if any(x.numel() == 0 for x in tensors) else torch.empty
    q, k, v = (make(x.shape, dtype=x.dtype, device=x.device) for x in tensors)
    return q, k, v


def _launch(prepared: Prepared, sink_q: torch.Tensor | None, cotangents: Cotangents, grads: Gradients) -> None:
    q, k, v, own_k, own_v, frames, mask, rope, scale = prepared
    batch, queries, heads, head_dim = q.shape
    dtype, block_d = k.dtype, padded(head_dim)
    kv_heads, keys = grads[1].shape[2], grads[1].shape[1]
    grad_out, out, grad_lse = addressable(cotangents.grad_out), addressable(cotangents.out), cotangents.grad_lse
    grad_lse = grad_lse.contiguous()
    delta = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    exact = dtype == torch.float32  # in half precision v is rounded far more coarsely than these sums
    incoming = Incoming(strided(grad_out), cotangents.lse, delta, grad_lse if exact else None)
    with on_device(q):
        architecture, short = tiles.architecture(), rope is not None and frames.tokens < 64
        by_rows, by_keys = (
            tiles.backward_tile(architecture, head_dim, dtype, prepared.use, of, short=short)
            for of in ("queries", "keys")
        )
        delta_rows = by_rows.rows if exact else pointwise_rows(block_d)
        shape = {"D": head_dim, "BLOCK_D": block_d}
        delta_kernel[(divide_up(queries, delta_rows) * heads * batch,)](
            strided(out), strided(grad_out), grad_lse, delta, queries, heads, **shape, BLOCK_M=delta_rows, EXACT=exact,
            num_warps=4, **FUSION,
        )  # fmt: skip

        def options(tile: tiles.TileSize) -> dict[str, int | bool]:
            return shape | FUSION | ALL_REGISTERS | {
                "GROUP": heads // kv_heads, "BLOCK_M": tile.rows, "BLOCK_N": tile.keys, "STAGES": tile.stages,
                "num_warps": tile.warps, "num_stages": tile.stages,
            }  # fmt: skip

        queried = (strided(q), None if sink_q is None else strided(sink_q))
        cached = key_values(k, v)
        own = None if own_k is None or own_v is None else key_values(own_k, own_v)
        position = (frames, rope_of(rope), mask_of(mask), scale, queries, keys)
        grad_q_kernel[(divide_up(queries, by_rows.rows) * heads * batch,)](
            *queried, cached, own, incoming, grads[0], *position, heads, TWO_FRAMES=frames.tokens >= by_rows.rows,
            **options(by_rows),
        )  # fmt: skip
        grad_kv_kernel[(divide_up(keys, by_keys.keys) * kv_heads * batch,)](
            *queried, cached if own is None else own, incoming, grads[1], grads[2], *position, kv_heads,
            **options(by_keys),
        )  # fmt: skip
