"""Device functions that every kernel shares: phases, rotation of a tile, stores that saturate."""

from __future__ import annotations

import triton
import triton.language as tl

from .masks import evicted_frames


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Rounds to DTYPE; float16 saturates (a rotation may grow by sqrt(2)), NaN stays NaN."""
    if x.dtype == DTYPE:
        return x
    if DTYPE == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(DTYPE)


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
def frame_phases(frames, TURNS, BLOCK_D: tl.constexpr, FRAME_PAIRS: tl.constexpr):
    """sin and cos of the frame pairs, ``[1 or rows, BLOCK_D / 2]``.

    Turns a frame, float64 in the table, become integers in units of 2**-64 turns: their products with frame numbers
    wrap at whole turns by themselves, exact to 2**-32 turns, in one 32-bit register each. float64 would take two, and
    consumer GPUs have next to no float64 units.
    """
    pair = tl.arange(0, BLOCK_D // 2)
    turns = tl.load(TURNS + pair, mask=pair < FRAME_PAIRS, other=0.0)
    turns = (turns - tl.floor(turns)) * 4294967296.0
    high = turns.to(tl.uint32)[None, :]
    low = ((turns - tl.floor(turns)) * 4294967296.0).to(tl.uint32)[None, :]
    frames = frames.to(tl.int32)
    signs = (frames >> 31).to(tl.uint32, bitcast=True)  # of a signed number times an unsigned one
    frames = frames.to(tl.uint32, bitcast=True)
    return sincos_turns(frames * high + tl.umulhi(frames, low) - (low & signs))


@triton.jit
def with_spatial(sin, cos, tokens, SPATIAL, D: tl.constexpr, BLOCK_D: tl.constexpr, FRAME_PAIRS: tl.constexpr):
    """Fills in the row and column pairs of ``tokens [rows]`` from the table."""
    pair = tl.arange(0, BLOCK_D // 2)
    if FRAME_PAIRS < D // 2:
        at = SPATIAL + 2 * (tokens[:, None] * (D // 2 - FRAME_PAIRS) + (pair - FRAME_PAIRS)[None, :])
        in_table = ((pair >= FRAME_PAIRS) & (pair < D // 2))[None, :] & (tokens >= 0)[:, None]
        cos = tl.where(in_table, tl.load(at, mask=in_table, other=1.0), cos)
        sin = tl.where(in_table, tl.load(at + 1, mask=in_table, other=0.0), sin)
    return cos, sin


@triton.jit
def phases(frames, tokens, TURNS, SPATIAL, D: tl.constexpr, BLOCK_D: tl.constexpr, FRAME_PAIRS: tl.constexpr):
    """cos and sin ``[rows or 1, BLOCK_D / 2]``; frames: a scalar or ``[rows, 1]``, tokens ``[rows]`` of their frame."""
    sin, cos = frame_phases(frames, TURNS, BLOCK_D, FRAME_PAIRS)
    return with_spatial(sin, cos, tokens, SPATIAL, D, BLOCK_D, FRAME_PAIRS)


@triton.jit
def phases_of_two(
    first, last, is_last, tokens, TURNS, SPATIAL, D: tl.constexpr, BLOCK_D: tl.constexpr, FRAME_PAIRS: tl.constexpr
):
    """`phases` of rows that lie in frame ``first``, or in ``last`` where ``is_last [rows]``: each computed once."""
    sin, cos = frame_phases(first, TURNS, BLOCK_D, FRAME_PAIRS)
    sin2, cos2 = frame_phases(last, TURNS, BLOCK_D, FRAME_PAIRS)
    sin, cos = tl.where(is_last[:, None], sin2, sin), tl.where(is_last[:, None], cos2, cos)
    return with_spatial(sin, cos, tokens, SPATIAL, D, BLOCK_D, FRAME_PAIRS)


@triton.jit
def _frame_of(
    index, shift, part, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, USE: tl.constexpr
):
    """The frame number at which a query is rotated."""
    frame = index // frame_tokens
    if USE == "window":
        return frame - part * evicted_frames(
            index, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens
        )
    return frame + shift


@triton.jit
def query_phases(
    first, last, index, shift, part, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, TURNS,
    SPATIAL, USE: tl.constexpr, TWO_FRAMES: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    FRAME_PAIRS: tl.constexpr,
):  # fmt: skip
    """cos and sin of a tile of queries, from token ``first`` to ``last``; TWO_FRAMES: it lies in two frames at most."""
    if TWO_FRAMES:
        frame = _frame_of(
            first, shift, part, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, USE
        )
        final = _frame_of(
            last, shift, part, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, USE
        )
        token = index - first // frame_tokens * frame_tokens
        is_last = token >= frame_tokens
        token = tl.where(is_last, token - frame_tokens, token)
        return phases_of_two(frame, final, is_last, token, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS)
    frame = _frame_of(
        index, shift, part, frame_tokens, sink_tokens, window_tokens, chunk_tokens, first_chunk_tokens, USE
    )
    return phases(frame[:, None], index % frame_tokens, TURNS, SPATIAL, D, BLOCK_D, FRAME_PAIRS)


@triton.jit
def head_columns(D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr):
    """Where the BLOCK_D columns of a tile of queries or keys lie in a head, and which exist.

    Pairs (i, i + D / 2) put the padding after each half, so that a padded tile still splits into its pairs.
    """
    column = tl.arange(0, BLOCK_D)
    exists = column < D
    if HALF and D != BLOCK_D:
        second = column >= BLOCK_D // 2
        within = tl.where(second, column - BLOCK_D // 2, column)
        column = tl.where(second, within + D // 2, within)
        exists = within < D // 2
    return column, exists


@triton.jit
def rotate_tile(x, cos, sin, HALF: tl.constexpr):
    """``x [rows, columns]`` in the order of `head_columns`, turned by the phases; in float32."""
    ROWS: tl.constexpr = x.shape[0]
    PAIRS: tl.constexpr = x.shape[1] // 2
    x = x.to(tl.float32)
    if HALF:
        a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, PAIRS)), (0, 2, 1)))
    else:
        a, b = tl.split(tl.reshape(x, (ROWS, PAIRS, 2)))
    turned = tl.join(a * cos - b * sin, a * sin + b * cos)
    if HALF:
        turned = tl.permute(turned, (0, 2, 1))
    return tl.reshape(turned, (ROWS, 2 * PAIRS))
