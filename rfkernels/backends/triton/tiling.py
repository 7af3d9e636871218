"""Device functions for one tile: where it lies, how it is loaded, rounded and multiplied."""

from __future__ import annotations

import triton
import triton.language as tl

from .structs import Columns, KeyValues, Tile, Tokens

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Rounds to DTYPE; float16 saturates (a rotation may grow by sqrt(2)), NaN stays NaN."""
    if x.dtype == DTYPE:
        return x
    if DTYPE == tl.float16:
        x = tl.where(x > 65504.0, 65504.0, tl.where(x < -65504.0, -65504.0, x))
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc=None):
    """Products of float32 are exact (``ieee``): TF32 would not be the float32 that was asked for."""
    PRECISION: tl.constexpr = "ieee" if a.dtype == tl.float32 else "tf32"
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def head_of(x, sample, head):
    """A pointer to the first token of a head."""
    return x.data + sample.to(tl.int64) * x.sample + head.to(tl.int64) * x.head


@triton.jit
def tokens_of(x, sample, head):
    return Tokens(head_of(x, sample, head), x.token, x.head)


@triton.jit
def key_values_of(x, sample, head):
    return KeyValues(tokens_of(x.k, sample, head), tokens_of(x.v, sample, head))


@triton.jit
def columns_of(rope, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Of tiles of queries and keys, and of tiles of values."""
    return KeyValues(pair_columns(rope, D, BLOCK_D), plain_columns(D, BLOCK_D))


@triton.jit
def pair_columns(rope, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The columns of a tile of queries or keys, whose padding leaves pairs together.

    Pairs (i, i + D / 2) put it after each half, so that a padded tile still splits into its pairs.
    """
    column = tl.arange(0, BLOCK_D)
    exist = column < D
    if rope is not None:
        if rope.half_split and D != BLOCK_D:
            second = column >= BLOCK_D // 2
            within = tl.where(second, column - BLOCK_D // 2, column)
            column = tl.where(second, within + D // 2, within)
            exist = within < D // 2
    return Columns(column, exist)


@triton.jit
def plain_columns(D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The columns of a tile of values: padding comes last."""
    column = tl.arange(0, BLOCK_D)
    return Columns(column, column < D)


@triton.jit
def tile_of(block, sample, head, tokens, BLOCK: tl.constexpr):
    """Rows are counted from the tile's first, in 32 bits: indices in the tensor would be kept for the last store."""
    first = block * BLOCK
    return Tile(sample, head, first, tl.minimum(tl.arange(0, BLOCK), tokens - 1 - first))


@triton.jit
def tile_pointers(x, tile, columns):
    first = head_of(x, tile.sample, tile.head) + tile.first.to(tl.int64) * x.token
    return first + (tile.row[:, None] * x.token + columns.at[None, :])


@triton.jit
def load_tile(x, tile, columns):
    return tl.load(tile_pointers(x, tile, columns), mask=columns.exist[None, :], other=0.0)
