"""How many blocks (programs) share the keys of one tile of queries: for Triton's kernels and for those in C++.

The twin of ``csrc/plan.h`` (``tests/test_plan.py`` holds the two together). Computed, not measured. Where tiles of
queries are few, processors stand idle; then several blocks take a share of a tile's keys each, and one launch more
joins their results.

- Blocks run in waves, ``per_processor`` of them beside each other on every processor, whose rate they share. A last
  wave that leaves a processor with fewer blocks is counted halfway between two cases: blocks run so much faster alone,
  or no faster. A share is whole tiles of keys, two or more.
- A merge's launch takes as long as a processor does for 256 keys. To write and read a partial result takes as long as
  192 keys, spread over all processors (128 rows in float32 beside 128 x 128 scores, at an A100's rates).
"""

from __future__ import annotations

MOST_SHARES = 16
_LAUNCH_KEYS, _PART_KEYS = 256, 192


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


def sharing_cost(shares: int, row_tiles: int, keys: int, tile_keys: int, processors: int, per_processor: int) -> int:
    """The time of all tiles with ``shares`` blocks for the keys of each, in units of half a key on all processors."""
    blocks, wave = row_tiles * shares, processors * per_processor
    waves, rest = divmod(blocks, wave)
    share = _divide_up(_divide_up(keys, tile_keys), shares) * tile_keys
    last = 0 if rest == 0 else _divide_up(rest, processors) + per_processor
    sweep = (2 * waves * per_processor + last) * share
    if shares == 1:
        return processors * sweep
    return processors * (sweep + 2 * _LAUNCH_KEYS) + 2 * _PART_KEYS * blocks


def key_shares(row_tiles: int, keys: int, tile_keys: int, processors: int, per_processor: int) -> int:
    """The cheapest number of shares; 1 where every processor has two tiles of queries or more.

    Args:
        row_tiles: tiles of queries of all heads and samples. keys: that one tile sees. tile_keys: of a tile of keys.
        processors: of the GPU. per_processor: blocks that one holds at a time.
    """
    if row_tiles >= 2 * processors:
        return 1
    most = min(keys // (2 * tile_keys), MOST_SHARES)
    return min(
        range(1, max(1, most) + 1),
        key=lambda shares: sharing_cost(shares, row_tiles, keys, tile_keys, processors, per_processor),
    )
