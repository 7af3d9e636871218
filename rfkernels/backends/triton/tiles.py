"""Tile sizes: pure functions of architecture, head size and dtype, so that nothing is tuned at run time.

No autotuning: a first call would time kernels in the middle of a stream and could not happen inside a CUDA graph, and
results would depend on what won. The choices below come from static reports (instructions per score, registers,
shared memory), not from timings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from ..plan import TilePlan, plan_tiles
from . import version_numbers
from .launch import padded

_BEFORE_3_7, _BEFORE_3_8 = (version_numbers(triton.__version__) < (3, minor) for minor in (7, 8))
# Below 3.7 the compiler puts no fence between what cp.async writes to shared memory and wgmma's reads of it (sm_90).
COPIES_ARE_FENCED = not _BEFORE_3_7

_INTERPRETER_PROCESSORS = 8  # so that small tests both split and do not


class TileSize(NamedTuple):
    """rows of queries, keys, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def architecture() -> int | None:
    """The kind of the current device: 80, 90, 100 or 120, which stand for their families; None in the interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    arch = triton.runtime.driver.active.get_current_target().arch
    return family(arch) if isinstance(arch, int) else 80  # other vendors: the plainest choice


def family(arch: int) -> int:
    """80: warp-wide tensor cores and, on sm_86, 99 KB of shared memory a block, as on 120; 90: wgmma; 100: tcgen05."""
    return 120 if arch >= 120 else 100 if arch >= 100 else 90 if arch >= 90 else 80


def hides_joins(arch: int | None, tile: TileSize) -> bool:
    """Whether queries that ``tl.join`` has put together go through a branch before their product with keys.

    Below 3.8 the compiler traces an operand back to a join, takes it for one of half its width, and loads what it is
    multiplied with word by word: twice the instructions of the loop, where products read registers (mma.sync). What
    comes out of a branch is not traced. Elsewhere a branch only costs registers.
    """
    return _BEFORE_3_8 and (arch in (80, 120) or (arch == 90 and tile.rows < 64))


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_tile(
    arch: int | None, head_dim: int, dtype: torch.dtype, use: str, *, rope: bool, shared: bool
) -> TileSize:
    """For the forward kernel, by head size and use ("prefix", "chunk", "window"); shared: by programs of a tile."""
    block_d = padded(head_dim)
    if arch is None:
        return TileSize(32, 16, 4, 1)  # interpreted: small, so that small shapes straddle tiles
    if dtype == torch.float32:
        # Exact products are scalar multiply-adds. With one stage ptxas gathers whole rows of both operands and spills;
        # so it does with 32 keys beside row bounds at 128 columns, and 64 rows leave one block an SM.
        few = block_d > 128 or (block_d == 128 and (use == "window" or (shared and _BEFORE_3_7)))
        return TileSize(32, 16 if few else 32, 4, 2)
    if arch == 90 and not COPIES_ARE_FENCED:
        return _through_registers(block_d)
    if block_d <= 64:
        return TileSize(128, 64, 8, 2)  # 4 warps spill
    if block_d == 128:
        return TileSize(128, _keys_for_128_columns(arch, head_dim, dtype, use, rope=rope, shared=shared), 8, 2)
    if arch in (90, 100):
        rows = 32 if (arch, use, rope) == (90, "window", True) else 64  # 64 rows spill there
        return TileSize(rows, 64, 8, 2)
    return TileSize(32, 32, 8, 2) if use == "window" else TileSize(64, 32, 8, 2)  # row bounds: 64 rows spill


def _through_registers(block_d: int) -> TileSize:
    """For sm_90 without fences: one stage is copied by way of registers, and those stores are fenced."""
    return TileSize(128, 64, 8, 1) if block_d <= 128 else TileSize(32, 64, 8, 1)  # 64 rows of 256 columns spill


def _keys_for_128_columns(arch: int, head_dim: int, dtype: torch.dtype, use: str, *, rope: bool, shared: bool) -> int:
    """128 keys halve the rescaling of the accumulator per score; fewer in these cases, in all of which more spill."""
    window, chunk = use == "window", use == "chunk"
    exceptions = (
        (window and arch == 80 and shared, 32),  # row bounds, of a share
        (window and (rope or shared or arch >= 100), 64),  # row bounds
        ((arch == 80 or (arch == 90 and chunk)) and shared, 64),  # the bounds of a share
        (chunk and arch == 120, 64),  # two segments of keys
        (chunk and arch < 100 and head_dim < 128, 64),  # two segments beside the mask of padded columns
        ((use, arch, dtype) == ("prefix", 80, torch.float16), 64),  # seen: 8 bytes of stack, none in bfloat16
    )
    return next((keys for applies, keys in exceptions if applies), 128)


def backward_tile(arch: int | None, head_dim: int, dtype: torch.dtype, use: str, of: str, *, short: bool) -> TileSize:
    """For the backward kernel of "queries" or of "keys"; the largest tiles that do not spill.

    short: frames of fewer than 64 tokens, so that every element of a tile may have an angle of its own.
    """
    block_d = padded(head_dim)
    if arch is None:
        return TileSize(32, 32, 4, 1)
    if dtype == torch.float32:  # two stages spill, as do more rows or keys
        if block_d <= 64:
            return TileSize(32 if of == "queries" else 16, 32, 4, 1)
        return TileSize(16, 16, 4 if block_d == 128 else 8, 1)
    if arch == 90 and not COPIES_ARE_FENCED and block_d <= 128:
        # 32 rows of a product go by mma.sync, which reads registers. One stage, as forward, spills at 64.
        rows = 32 if block_d == 32 else 64  # beside a row bound 64 spill there
        return TileSize(32, 64, 8, 2) if of == "queries" else TileSize(rows, 32, 8, 2)
    if block_d == 32:  # on sm_90 two stages of 64 rows crash ptxas 12.9 (a window's queries, with a rope)
        return TileSize(64, 32, 8, 1 if (of, arch) == ("queries", 90) else 2)
    if block_d == 64:  # 4 warps, and 64x64, spill; on sm_120 64 rows of queries do
        return TileSize(32, 64, 8, 2) if (of, arch) == ("queries", 120) else TileSize(64, 32, 8, 2)
    if block_d == 128:
        if of == "keys":  # 64 rows spill with fragments in registers (sm_80, sm_120) or padded columns (sm_90)
            return TileSize(64 if arch == 100 or (arch == 90 and head_dim == block_d) else 32, 64, 8, 2)
        if arch == 120 or (use == "window" and (short or arch == 100)):  # 64 rows spill
            return TileSize(32, 64, 8, 2)
        return TileSize(64, 64, 8, 2) if arch == 100 else TileSize(64, 32, 8, 2)
    few = (of, use) == ("queries", "window") and (short or arch == 100)  # 32 rows spill
    return TileSize(16 if few else 32, 32, 8, 1)


def plan(arch: int | None, row_tiles: int, keys: int, tile: TileSize, processors: int) -> TilePlan:
    """Which tiles of queries have programs that share their keys: `plan_tiles`, of one program a processor."""
    if arch is None:  # the interpreter's tiles are small, so that small shapes are shared too
        return plan_tiles(row_tiles, keys * 128 // tile.keys, 128, processors, 1)
    return plan_tiles(row_tiles, keys, tile.keys, processors, 1)
