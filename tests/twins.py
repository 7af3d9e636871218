"""The slot arithmetic and the plan of csrc/geometry.h and csrc/plan.h, compiled by themselves."""

import ctypes
import os
import shutil
import subprocess
import tempfile
from ctypes import c_bool, c_int64
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_name("twins.cpp")


@cache
def library() -> ctypes.CDLL:
    """Skips where there is no compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "twins.so"
        command = [compiler, "-std=c++17", "-shared", "-fPIC", "-Wall", "-Werror", str(SOURCE), "-o", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        loaded = ctypes.CDLL(str(file))
    for name in ("evicted_frames", "valid_frames", "slot", "fuse_slot", "sink_position", "chunk_begin", "chunk_end"):
        getattr(loaded, name).restype = c_int64
    loaded.visible.restype = c_bool
    loaded.plan_tiles.restype = None
    return loaded


class _Struct(ctypes.Structure):
    def __getattr__(self, name):  # a function of the library, of this struct and integers
        return lambda *integers: getattr(library(), name)(ctypes.byref(self), *map(c_int64, integers))


class CacheGeometry(_Struct):
    _fields_ = [(name, c_int64) for name in ("sink_frames", "window_frames", "frame_tokens")]


class WindowMask(_Struct):
    _lengths = ("sink_tokens", "window_tokens", "chunk_tokens", "first_chunk_tokens")
    _fields_ = [*((name, c_int64) for name in _lengths), ("own_chunk", c_bool)]


def plan_tiles(*sizes: int) -> tuple[int, int]:
    plan = (c_int64 * 2)()
    library().plan_tiles(*map(c_int64, sizes), plan)
    return tuple(plan)
