"""Which blocks (programs) sweep the keys of which tile of queries: for Triton's kernels and for those in C++.

The twin of ``csrc/plan.h`` (``tests/test_plan.py`` holds the two together). Computed, not measured. Blocks run in
waves, one or two on every processor. Tiles that fill whole waves have a block each, which sweeps all their keys and
writes its rows. What is left of a wave would keep few processors busy: there several blocks take a share of a tile's
keys each, and one launch more joins their results. Short chunks and small batches are the case without a whole wave.

- ``per_processor`` blocks share the rate of a processor. A last wave that leaves a processor with fewer blocks is
  counted halfway between two cases: blocks run so much faster alone, or no faster. A share is whole tiles of keys, two
  or more.
- A merge's launch takes as long as a processor does for 256 keys. To write and read a partial result takes as long as
  192 keys, spread over all processors (128 rows in float32 beside 128 x 128 scores, at an A100's rates).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

MOST_SHARES = 16
_LAUNCH_KEYS, _PART_KEYS = 256, 192


class TilePlan(NamedTuple):
    """The first ``whole`` tiles of queries have a block each, every further one (the tail) has ``shares``."""

    whole: int
    shares: int


def divide_up(a: int, b: int) -> int:
    """(Triton's own function costs the host several microseconds.)"""
    return -(-a // b)


def sweep_time(blocks: int, share: int, processors: int, per_processor: int) -> int:
    """The time of ``blocks`` that sweep ``share`` keys each, in half of what a processor takes for a key alone."""
    waves, rest = divmod(blocks, processors * per_processor)
    last = 0 if rest == 0 else divide_up(rest, processors) + per_processor
    return (2 * waves * per_processor + last) * share


def plan_time(plan: TilePlan, row_tiles: int, keys: int, tile_keys: int, processors: int, per_processor: int) -> int:
    """The time of all tiles by a plan, the merge included, in units of half a key on all processors."""
    key_tiles, parts = divide_up(keys, tile_keys), (row_tiles - plan.whole) * plan.shares
    time = sweep_time(plan.whole, key_tiles * tile_keys, processors, per_processor) + sweep_time(
        parts, divide_up(key_tiles, plan.shares) * tile_keys, processors, per_processor
    )
    return processors * time if plan.shares == 1 else processors * (time + 2 * _LAUNCH_KEYS) + 2 * _PART_KEYS * parts


@functools.cache  # asked for every layer of every pass
def plan_tiles(row_tiles: int, keys: int, tile_keys: int, processors: int, per_processor: int) -> TilePlan:
    """The cheapest plan; where sharing does not pay, all tiles are whole and shares is 1.

    Args:
        row_tiles: tiles of queries of all heads and samples. keys: that one tile sees. tile_keys: of a tile of keys.
        processors: of the GPU. per_processor: blocks that one holds at a time.
    """
    wave = processors * per_processor
    full = row_tiles // wave * wave
    plans = [TilePlan(row_tiles, 1)]
    if full < row_tiles:
        plans += [TilePlan(full, shares) for shares in range(2, min(keys // (2 * tile_keys), MOST_SHARES) + 1)]
    return min(plans, key=lambda plan: plan_time(plan, row_tiles, keys, tile_keys, processors, per_processor))
