"""How full the processors of a GPU are kept by the forward's plan of tiles (`rfkernels.backends.plan`): computed.

Tiles of queries over processors times makespan, both in tiles: 1 where no processor ever waits. A whole operation's
tiles are taken to be alike, and to see all keys.
"""

from __future__ import annotations

from typing import NamedTuple

from rfkernels.backends.plan import TilePlan, plan_tiles, plan_time

PROCESSORS = {"RTX 3090": 82, "A100": 108, "RTX 4090": 128, "H100": 132, "L40S": 142, "B200": 148, "RTX 5090": 170}
ROWS = 128  # queries of a tile


class Kernel(NamedTuple):
    tile_keys: int
    per_processor: int  # blocks


class Pass(NamedTuple):
    """A streaming pass: heads, tokens of a frame, frames of a chunk and frames that it sees."""

    heads: int
    tokens: int
    frames: int
    window: int

    def sizes(self, kernel: Kernel, processors: int) -> tuple[int, int, int, int, int]:
        """What a plan is made of."""
        row_tiles = -(-self.frames * self.tokens // ROWS) * self.heads
        return row_tiles, self.window * self.tokens, kernel.tile_keys, processors, kernel.per_processor


KERNELS = {
    "one block": Kernel(128, 1),  # Triton's, and Hopper's in CUDA
    "two blocks": Kernel(64, 2),  # mma.sync
    "two blocks, small tiles": Kernel(32, 2),  # the same where an SM has 100 KB of shared memory
}
PASSES = {
    "1.3B": Pass(12, 1560, 3, 9),
    "1.3B, chunks of a frame": Pass(12, 1560, 1, 9),
    "14B": Pass(40, 1560, 3, 9),
    "14B, chunks of a frame": Pass(40, 1560, 1, 9),
    "1.3B, 720p": Pass(12, 3600, 3, 9),
    "14B, 720p": Pass(40, 3600, 3, 9),
    "5B": Pass(24, 880, 8, 32),
    "1.3B, 390 tokens a frame": Pass(12, 390, 3, 9),
    "1.3B, 100 tokens a frame": Pass(12, 100, 3, 9),
}


def filled(plan: TilePlan, row_tiles: int, keys: int, tile_keys: int, processors: int, per_processor: int) -> float:
    """Tiles over processors times makespan, without the merge: blocks are handed out wave by wave.

    Blocks of one processor share its rate. Where a last wave leaves it fewer than it holds, they run at the mean of two
    rates: as fast as if the others were there, or as much faster as these leave room.
    """
    key_tiles = -(-keys // tile_keys)
    share = -(-key_tiles // plan.shares)
    lengths = [key_tiles] * plan.whole + [share] * ((row_tiles - plan.whole) * plan.shares)
    wave, time = processors * per_processor, 0.0
    for first in range(0, len(lengths), wave):
        blocks = lengths[first : first + wave]
        full = len(blocks) == wave
        time += max(blocks) * (per_processor if full else (-(-len(blocks) // processors) + per_processor) / 2)
    return row_tiles * key_tiles / (processors * time)


def with_merge(plan: TilePlan, *sizes: int) -> float:
    """The same with the time that the merge takes by the plan's own measure."""
    row_tiles, keys, tile_keys = sizes[:3]
    return row_tiles * -(-keys // tile_keys) * tile_keys * 2 / plan_time(plan, *sizes)


def table() -> list[str]:
    lines = [
        "| pass | kernel | " + " | ".join(f"{name}: {count}" for name, count in PROCESSORS.items()) + " |",
        "|---|---|" + "---|" * len(PROCESSORS),
    ]
    for (name, each), (kernel, tiles) in ((p, k) for p in PASSES.items() for k in list(KERNELS.items())[:2]):
        cells = []
        for processors in PROCESSORS.values():
            sizes = each.sizes(tiles, processors)
            plan = plan_tiles(*sizes)
            before, after, merged = (
                100 * x for x in (filled(TilePlan(sizes[0], 1), *sizes), filled(plan, *sizes), with_merge(plan, *sizes))
            )
            cells.append(f"{before:.0f}" if plan.shares == 1 else f"{before:.0f}, {after:.0f} ({merged:.0f})")
        lines.append(f"| {name} | {kernel} | " + " | ".join(cells) + " |")
    return lines
