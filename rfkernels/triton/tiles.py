"""Tile sizes: pure functions of architecture, head size and dtype, so that nothing is tuned at run time.

No autotuning: a first call would time kernels in the middle of a stream and could not happen inside a CUDA graph, and
results would depend on what won. The choices below come from static reports (instructions per score, registers,
shared memory), not from timings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

_INTERPRETER_PROCESSORS = 8  # so that small tests both split and do not


class Tile(NamedTuple):
    """rows of queries, keys, warps of a program, stages of its pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int


def architecture() -> int | None:
    """Compute capability of the current device as Triton counts it (90 for sm_90); None in the interpreter."""
    if triton.knobs.runtime.interpret:
        return None
    arch = triton.runtime.driver.active.get_current_target().arch
    return arch if isinstance(arch, int) else 80  # other vendors: the plainest choice


def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def forward_tile(arch: int | None, block_d: int, dtype: torch.dtype, use: str) -> Tile:
    """For the forward kernel, by padded head size and use ("prefix", "chunk" or "window")."""
    if arch is None:
        return Tile(32, 16, 4, 1)  # interpreted: small, so that small shapes straddle tiles
    if dtype == torch.float32:  # exact products are scalar multiply-adds: small tiles, or registers run out
        return Tile(32, 32, 4, 1) if block_d <= 128 else Tile(16, 32, 4, 1)
    if block_d <= 64:
        return Tile(128, 64, 8, 2)  # 4 warps spill
    if block_d == 128:
        if use == "prefix":
            # 128 keys halve the rescaling of the accumulator per score; only where a single range of keys is swept are
            # there the registers for them.
            return Tile(128, 128, 8, 2)
        if use != "prefix" and arch == 100:
            return Tile(64, 64, 8, 2)  # 128 rows spill
        if use == "window" and arch != 90:
            return Tile(128, 32, 8, 2)  # row bounds and two images of the queries: 64 keys spill
        return Tile(128, 64, 8, 2)
    if arch in (90, 100):
        return Tile(64, 64, 8, 2)
    return Tile(32, 32, 8, 2) if use == "window" else Tile(64, 32, 8, 2)  # row bounds: 64 rows spill


def backward_tile(arch: int | None, head_dim: int, dtype: torch.dtype, use: str, of: str) -> Tile:
    """For the backward kernel of "queries" or of "keys"; the largest tiles that do not spill."""
    block_d = triton.next_power_of_2(head_dim)
    if arch is None:
        return Tile(32, 32, 4, 1)
    if dtype == torch.float32:
        return Tile(32, 32, 4, 1) if block_d <= 64 else Tile(16, 16, 4, 1)
    if block_d <= 64:
        return Tile(64, 32, 4, 2)  # 64x64 spills, with 8 warps too
    if block_d == 128:
        if of == "queries":
            if arch in (100, 120):
                return Tile(32, 64, 4, 2) if use == "chunk" and arch == 100 else Tile(32, 64, 8, 2)
            return Tile(64, 64, 8, 2) if arch == 80 else Tile(64, 32, 8, 2)
        if arch in (100, 120) or (arch == 80 and head_dim < block_d):  # masks of the padding: 64 rows spill
            return Tile(32, 64, 8, 2)
        return Tile(64, 64, 8, 2)
    return Tile(32, 32, 8, 1)


def splits(programs: int, keys: int, tile: Tile, processors: int) -> int:
    """How many programs share the keys of one query tile: as many as fill one wave, each with two tiles or more."""
    return max(1, min(processors // max(programs, 1), keys // (2 * tile.keys), 16))
