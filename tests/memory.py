"""What a process holds, and that it stays so: for streams that do not end."""

from __future__ import annotations

import gc
import multiprocessing
from collections.abc import Callable

import torch


def memory() -> tuple[int, int, int]:
    """Tensors alive, their bytes, and the process's resident bytes."""
    gc.collect()
    sizes = [x.nbytes for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    with open("/proc/self/statm") as statm:
        return len(sizes), sum(sizes), int(statm.read().split()[1]) * 4096


def check_constant(stream: Callable, *args):
    """``stream(*args)`` returns `memory` early and late, and anything else, which is handed on.

    It runs in a process of its own: every tensor alive is counted, and what earlier tests left behind comes and goes.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (early, late), *rest = pool.apply(stream, args)
    assert early[:2] == late[:2]
    assert late[2] - early[2] < 8 << 20
    return rest
