"""Which keys a tile of queries sweeps, and which queries a tile of keys: against the rule itself, key by key."""

import ctypes
import itertools

import pytest
import torch

from cuda.backward import plan
from cuda.launch import problem
from rfkernels.contract.geometry import WindowMask

KEYS = 60
MASKS = [
    WindowMask(*sizes, own_chunk)
    for sizes in ((0, 7, 1, 1), (3, 5, 1, 1), (6, 12, 6, 6), (4, 12, 6, 2), (9, 4, 6, 6), (5, 200, 10, 10))
    for own_chunk in (True, False)
]


class Sweep(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("begin", "end", "full_begin", "full_end")]

    def ranges(self) -> tuple[set[int], set[int]]:
        """What is swept, and the part of it that nothing has to be hidden in."""
        swept = set(range(self.begin, self.end))
        return swept, swept & set(range(self.full_begin, self.full_end))


@pytest.fixture(params=[KEYS, 41], ids=["all queries", "the last 41"])
def queries(request):
    return request.param


def window(queries: int, mask: WindowMask):
    """The problem, and which (row, key) pairs are seen: in the window, and as sinks outside it."""
    q, k = torch.zeros(1, queries, 1, 8), torch.zeros(1, KEYS, 1, 8)
    i, j = torch.arange(KEYS - queries, KEYS)[:, None], torch.arange(KEYS)
    outside = j < mask.chunk_end(i) - mask.window_tokens
    seen = mask.visible(i, j)
    return problem(q, k, k, mask=mask)[0], (seen & ~outside, seen & outside)


def indices(of: torch.Tensor) -> set[int]:
    return set(of.nonzero().flatten().tolist())


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_keys_of_a_tile_of_queries(queries, mask):
    struct, parts = window(queries, mask)
    sweep, row_range = Sweep(), (ctypes.c_int * 2)()
    for (part, seen), first, rows in itertools.product(enumerate(parts), range(queries), (1, 5, 16)):
        last = min(first + rows, queries) - 1
        plan().tile_keys(ctypes.byref(struct), 0, part, first, last, ctypes.byref(sweep))
        swept, full = sweep.ranges()
        assert indices(seen[first : last + 1].any(0)) <= swept
        assert full <= indices(seen[first : last + 1].all(0))
        plan().row_keys(ctypes.byref(struct), part, first, row_range)
        assert set(range(*row_range)) == indices(seen[first])


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_queries_of_a_tile_of_keys(queries, mask):
    struct, parts = window(queries, mask)
    sweep = Sweep()
    for (part, seen), first, keys in itertools.product(enumerate(parts), range(KEYS), (1, 5, 16)):
        last = min(first + keys, KEYS) - 1
        plan().tile_queries(ctypes.byref(struct), 0, part, first, last, ctypes.byref(sweep))
        swept, full = sweep.ranges()
        assert indices(seen[:, first : last + 1].any(1)) <= swept
        assert full <= indices(seen[:, first : last + 1].all(1))


@pytest.mark.parametrize("age", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("own", [False, True], ids=["prefix", "chunk"])
def test_keys_of_an_open_chunk(age, own):
    """Three frames of four tokens are open in a cache of five; a stream may be younger than the chunk."""
    tokens, frames, capacity = 4, 3, 5
    q, k = torch.zeros(1, frames * tokens, 1, 8), torch.zeros(1, capacity * tokens, 1, 8)
    ages = torch.tensor([age])
    more = {"own_k": q, "own_v": q} if own else {}
    struct, kept = problem(q, k, k, num_frames=ages, frame_tokens=tokens, capacity=capacity, **more)
    missing, valid = max(frames - age, 0) * tokens, min(age, capacity)
    sweep = Sweep()
    for part, (first, last) in itertools.product(range(1 + own), itertools.combinations(range(frames * tokens), 2)):
        plan().tile_keys(ctypes.byref(struct), 0, part, first, last, ctypes.byref(sweep))
        swept, full = sweep.ranges()
        wanted = range(missing, frames * tokens) if part else range(max(valid - frames * own, 0) * tokens)
        assert swept == full == (set(wanted) if last >= missing else set())
    assert kept
