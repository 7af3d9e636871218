"""Rotation: phases of a tile, in device functions that every kernel shares, and the kernel that only rotates."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...contract.geometry import WindowMask
from ...contract.requests import RopeTables
from ..plan import divide_up
from .launch import FUSION, addressable, mask_of, on_device, padded, rope_of, strided
from .ranges import evicted_frames
from .structs import Frames
from .tiling import head_of, narrow, pair_columns

_TOKENS = 32  # of one head, rotated by a program


@triton.jit
def sincos_turns(t):
    """sin and cos, in float32 to 1e-7, of unsigned 32-bit ``t`` in units of 2**-32 turns.

    Polynomials over an eighth of a turn: libdevice's sinf carries a slow path for huge angles and its stack frame.
    """
    quarter = (t + 0x20000000) >> 30
    # Rounded to float32 after the reduction: half a turn in float32 is off by 2e-7 in its angle, an eighth by 5e-8.
    r = (t - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09  # 2 pi / 2**32
    r2 = r * r
    s = r + r * r2 * (-1.0 / 6 + r2 * (1.0 / 120 + r2 * (-1.0 / 5040 + r2 * (1.0 / 362880))))
    c = 1.0 + r2 * (-0.5 + r2 * (1.0 / 24 + r2 * (-1.0 / 720 + r2 * (1.0 / 40320 + r2 * (-1.0 / 3628800)))))
    swap = (quarter & 1) == 1
    sin = tl.where(swap, c, s)
    cos = tl.where(swap, s, c)
    sin = tl.where(quarter >= 2, -sin, sin)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    return sin, cos


@triton.jit
def frame_phases(frames, rope, BLOCK_D: tl.constexpr):
    """sin and cos of the frame pairs, ``[1 or rows, BLOCK_D / 2]``.

    Turns a frame, float64 in the table, become integers in units of 2**-64 turns: their products with frame numbers
    wrap at whole turns by themselves, exact to 2**-32 turns, in one 32-bit register each. float64 would take two, and
    consumer GPUs have next to no float64 units.
    """
    pair = tl.arange(0, BLOCK_D // 2)
    turns = tl.load(rope.frame_turns + pair, mask=pair < rope.frame_pairs, other=0.0)
    turns = (turns - tl.floor(turns)) * 4294967296.0
    high = turns.to(tl.uint32)[None, :]
    low = ((turns - tl.floor(turns)) * 4294967296.0).to(tl.uint32)[None, :]
    frames = frames.to(tl.int32)
    signs = (frames >> 31).to(tl.uint32, bitcast=True)  # of a signed number times an unsigned one
    frames = frames.to(tl.uint32, bitcast=True)
    return sincos_turns(frames * high + tl.umulhi(frames, low) - (low & signs))


@triton.jit
def with_spatial(sin, cos, tokens, rope, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Fills in the row and column pairs of ``tokens [rows]`` from the table."""
    pair = tl.arange(0, BLOCK_D // 2)
    if rope.frame_pairs < D // 2:
        at = rope.spatial + 2 * (tokens[:, None] * (D // 2 - rope.frame_pairs) + (pair - rope.frame_pairs)[None, :])
        in_table = ((pair >= rope.frame_pairs) & (pair < D // 2))[None, :] & (tokens >= 0)[:, None]
        cos = tl.where(in_table, tl.load(at, mask=in_table, other=1.0), cos)
        sin = tl.where(in_table, tl.load(at + 1, mask=in_table, other=0.0), sin)
    return cos, sin


@triton.jit
def phases(frames, tokens, rope, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """cos and sin ``[rows or 1, BLOCK_D / 2]``; frames: a scalar or ``[rows, 1]``, tokens ``[rows]`` of their frame."""
    sin, cos = frame_phases(frames, rope, BLOCK_D)
    return with_spatial(sin, cos, tokens, rope, D, BLOCK_D)


@triton.jit
def phases_of_two(first, last, is_last, tokens, rope, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """`phases` of rows that lie in frame ``first``, or in ``last`` where ``is_last [rows]``: each computed once."""
    sin, cos = frame_phases(first, rope, BLOCK_D)
    sin2, cos2 = frame_phases(last, rope, BLOCK_D)
    sin, cos = tl.where(is_last[:, None], sin2, sin), tl.where(is_last[:, None], cos2, cos)
    return with_spatial(sin, cos, tokens, rope, D, BLOCK_D)


@triton.jit
def _frame_of(index, first_frame, segment, frame_tokens, mask):
    """The frame number at which the query of token ``index`` is rotated when it meets the keys of a segment."""
    frame = index // frame_tokens
    if mask is None:
        frame = frame + first_frame
    elif segment == 1:
        frame = frame - evicted_frames(index, frame_tokens, mask)
    return frame


@triton.jit
def query_phases(
    tile, offset, count, first_frame, segment, frame_tokens, mask, rope, TWO_FRAMES: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cos and sin of a tile of queries, of which row 0 in the tensor of ``count`` rows is token ``offset``.

    TWO_FRAMES: the tile lies in two frames at most.
    """
    index = tile.first + tile.row + offset
    if TWO_FRAMES:
        BLOCK_M: tl.constexpr = tile.row.shape[0]
        first = tile.first + offset
        last = tl.minimum(tile.first + BLOCK_M, count) - 1 + offset
        frame = _frame_of(first, first_frame, segment, frame_tokens, mask)
        final = _frame_of(last, first_frame, segment, frame_tokens, mask)
        token = index - first // frame_tokens * frame_tokens
        is_last = token >= frame_tokens
        token = tl.where(is_last, token - frame_tokens, token)
        return phases_of_two(frame, final, is_last, token, rope, D, BLOCK_D)
    else:
        frame = _frame_of(index, first_frame, segment, frame_tokens, mask)
        return phases(frame[:, None], index % frame_tokens, rope, D, BLOCK_D)


@triton.jit
def rotate_tile(x, cos, sin, rope):
    """``x [rows, columns]``, laid out by `pair_columns`, rotated by the phases; in float32."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    x = x.to(tl.float32)
    if rope.half_split:
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, PAIRS)), (0, 2, 1)))
    else:
        a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    rotated = tl.join(a * cos - b * sin, a * sin + b * cos)
    if rope.half_split:
        rotated = tl.permute(rotated, (0, 2, 1))
    return tl.reshape(rotated, (ROWS, 2 * PAIRS))


# --- rotate -----------------------------------------------------------------------------------------------------------


@triton.jit
def rotate_kernel(
    x, OUT, frames, rope, mask, tokens, heads, first_token,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """``OUT [B, tokens, heads, D]`` = x rotated; row r is token ``first_token + r`` of its sequence.

    With frames.seen the rows are the newest frames of a stream; else the sequence starts at frame 0. With a mask they
    are queries, rotated as they meet the sinks outside their window.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(tokens, TOKENS)
    row = (pid % blocks) * TOKENS + tl.arange(0, TOKENS)
    head = (pid // blocks % heads).to(tl.int64)
    sample = (pid // (blocks * heads)).to(tl.int64)
    columns = pair_columns(rope, D, BLOCK_D)
    exist = (row < tokens)[:, None] & columns.exist[None, :]
    index = tl.minimum(row, tokens - 1) + first_token
    values = tl.load(
        head_of(x, sample, head) + row.to(tl.int64)[:, None] * x.token + columns.at[None, :], mask=exist, other=0.0
    )
    if rope is not None:
        frame = index // frames.tokens
        if frames.seen is not None:
            frame = frame + tl.load(frames.seen + sample) - tokens // frames.tokens
        if mask is not None:
            frame = frame - evicted_frames(index, frames.tokens, mask)
        cos, sin = phases(frame[:, None], index % frames.tokens, rope, D, BLOCK_D)
        values = rotate_tile(values, cos, sin, rope)
    out = OUT + ((sample * tokens + row.to(tl.int64)[:, None]) * heads + head) * D + columns.at[None, :]
    tl.store(out, narrow(values, OUT.dtype.element_ty), mask=exist)


def rotate(
    x: torch.Tensor,
    rope: RopeTables | None,
    dtype: torch.dtype,
    *,
    num_frames: torch.Tensor | None = None,
    first_token: int = 0,
    mask: WindowMask | None = None,
) -> torch.Tensor:
    """``x [B, N, H, D]`` rotated, in dtype; x itself where there is nothing to do.

    num_frames: the rows are the newest frames of these streams. mask: queries as sinks outside their window meet them.
    """
    x = addressable(x)
    if rope is None and x.dtype == dtype:
        return x
    batch, tokens, heads, head_dim = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    frames = Frames(num_frames, 1 if rope is None else rope.frame_tokens, None)
    with on_device(x):
        rotate_kernel[(divide_up(tokens, _TOKENS) * heads * batch,)](
            strided(x), out, frames, rope_of(rope), mask_of(mask), tokens, heads, first_token, D=head_dim,
            BLOCK_D=padded(head_dim), TOKENS=_TOKENS, num_warps=8, **FUSION,
        )  # fmt: skip
    return out
