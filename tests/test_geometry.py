"""The Python and the C++ slot arithmetic are the same, and tensors give what integers give."""

import itertools

import pytest
import torch
import twins

from rfkernels.contract.geometry import CacheGeometry, WindowMask


@pytest.mark.parametrize("sink, window", [(0, 1), (0, 4), (1, 1), (3, 6), (2, 5)])
def test_cache_geometry_equals_cpp(sink, window):
    ours, theirs = CacheGeometry(sink, window, 7), twins.CacheGeometry(sink, window, 7)
    numbers = torch.arange(40)
    for n in range(40):
        assert ours.evicted_frames(n) == theirs.evicted_frames(n) == ours.evicted_frames(numbers)[n]
        assert ours.valid_frames(n) == theirs.valid_frames(n) == ours.valid_frames(numbers)[n]
        assert ours.slot(n) == theirs.slot(n) == ours.slot(numbers)[n]
        if sink:
            assert ours.fuse_slot(n) == theirs.fuse_slot(n)
        for slot, before in itertools.product(range(sink), (True, False)):
            assert ours.sink_position(slot, n, before) == theirs.sink_position(slot, n, before)


@pytest.mark.parametrize("chunk, first", [(1, 1), (3, 3), (3, 1), (4, 6)])
@pytest.mark.parametrize("own_chunk", [True, False])
def test_window_mask_equals_cpp(chunk, first, own_chunk):
    arguments = (2, 5, chunk, first, own_chunk)
    ours, theirs = WindowMask(*arguments), twins.WindowMask(*arguments)
    i, j = torch.arange(24)[:, None], torch.arange(24)
    dense = ours.visible(i, j)
    for a, b in itertools.product(range(24), range(24)):
        assert ours.visible(a, b) == theirs.visible(a, b) == dense[a, b]
        assert (ours.chunk_begin(a), ours.chunk_end(a)) == (theirs.chunk_begin(a), theirs.chunk_end(a))


def test_frames_and_slots_of_a_window_are_one_to_one():
    geometry = CacheGeometry(3, 6, 1)
    for n in range(1, 50):
        visible = [g for g in range(n) if g < 3 or g >= n - 6]
        assert sorted(map(geometry.slot, visible)) == list(range(geometry.valid_frames(n)))
