"""How many blocks share the keys of a tile of queries: what is wanted on GPUs by name, and the same in C++."""

import itertools

import pytest
import twins

from rfkernels.backends.plan import MOST_SHARES, key_shares, sharing_cost

PROCESSORS = {"RTX 3090": 82, "A100": 108, "H100": 132, "B200": 148, "RTX 5090": 170}
HEADS, WINDOW, ROWS = 12, 9, 128  # of the paper's model; frames that a chunk of three sees; queries of a tile
# Kernels by keys of a tile and blocks of a processor: Triton's and Hopper's, and those with mma.sync.
KERNELS = {"one block": (128, 1), "two blocks": (64, 2), "two blocks, small tiles": (32, 2)}


def shares(gpu: str, tokens: int, kernel: str, frames: int = 3) -> int:
    """Of a pass over a chunk of frames of ``tokens`` tokens."""
    tiles = -(-frames * tokens // ROWS) * HEADS
    return key_shares(tiles, WINDOW * tokens, *KERNELS[kernel][:1], PROCESSORS[gpu], KERNELS[kernel][1])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", PROCESSORS)
def test_a_pass_at_the_papers_shape_is_not_shared(gpu, kernel):
    """444 tiles of queries: every processor has two or more."""
    assert shares(gpu, 1560, kernel) == 1


def test_a_chunk_of_256_tokens_a_frame_fills_an_h100():
    """72 tiles of queries would leave 60 of 132 processors idle; in three shares they are one wave and two thirds."""
    assert shares("H100", 256, "one block") == 3
    assert shares("H100", 256, "two blocks") == 3  # 216 of 264 blocks, in one wave


@pytest.mark.parametrize(
    "gpu, tokens, wanted",
    [("H100", 64, 1), ("H100", 128, 3), ("A100", 390, 4), ("H100", 390, 1), ("RTX 5090", 256, 2)],
)
def test_shares_of_kernels_with_one_block_a_processor(gpu, tokens, wanted):
    """At 64 tokens a frame a merge costs more than it saves; 120 tiles fill an H100 well, and an A100 badly."""
    assert shares(gpu, tokens, "one block") == wanted


def test_one_query_over_a_long_past_is_shared_as_far_as_it_goes():
    assert key_shares(1, 100_000, 128, 132, 1) == MOST_SHARES
    assert key_shares(1, 10 * 128, 128, 132, 1) == 5  # two tiles each
    assert key_shares(1, 5 * 128, 128, 132, 1) == 1  # two shares save two tiles, which is what a merge's launch takes


GRID = list(
    itertools.product((1, 12, 24, 72, 107, 120, 215, 300), (1, 204, 576, 2304, 14040), KERNELS, PROCESSORS.values())
)


def test_sharing_never_costs_more_by_its_own_measure():
    for tiles, keys, kernel, processors in GRID:
        sizes = (tiles, keys, KERNELS[kernel][0], processors, KERNELS[kernel][1])
        chosen = key_shares(*sizes)
        assert 1 <= chosen <= MOST_SHARES
        assert chosen == 1 or (2 * KERNELS[kernel][0] * chosen <= keys and tiles < 2 * processors)
        assert sharing_cost(chosen, *sizes) <= sharing_cost(1, *sizes)


def test_equals_cpp():
    for tiles, keys, kernel, processors in GRID:
        sizes = (tiles, keys, KERNELS[kernel][0], processors, KERNELS[kernel][1])
        assert key_shares(*sizes) == twins.key_shares(*sizes), sizes
