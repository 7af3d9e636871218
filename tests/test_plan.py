"""Which blocks sweep the keys of which tile of queries: what is wanted on GPUs by name, and the same in C++."""

import itertools

import pytest
import twins

from rfkernels.backends.plan import MOST_SHARES, TilePlan, plan_tiles, plan_time

waves = pytest.importorskip("benchmarks.waves", reason="needs the source tree")
PROCESSORS, KERNELS, PASSES, Pass = waves.PROCESSORS, waves.KERNELS, waves.PASSES, waves.Pass


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", PROCESSORS)
@pytest.mark.parametrize("name", PASSES)
def test_a_wave_or_more_leaves_no_twentieth_idle(name, gpu, kernel):
    given = PASSES[name].sizes(KERNELS[kernel], PROCESSORS[gpu])
    if given[0] < PROCESSORS[gpu] * KERNELS[kernel].per_processor:
        pytest.skip("less than a wave of tiles")
    assert waves.filled(plan_tiles(*given), *given) >= 0.95


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gpu", PROCESSORS)
def test_the_papers_shape(gpu, kernel):
    """444 tiles: whole waves, and shares for what is left; on 148 processors the tiles are three waves."""
    given = PASSES["1.3B"].sizes(KERNELS[kernel], PROCESSORS[gpu])
    whole, shares = plan_tiles(*given)
    wave = PROCESSORS[gpu] * KERNELS[kernel].per_processor
    assert given[0] == 444
    if 444 % wave == 0:
        assert (whole, shares) == (444, 1)
    else:
        assert whole == 444 // wave * wave and shares > 1


def test_short_chunks_are_the_case_without_a_whole_wave():
    """256 tokens a frame: 72 tiles of queries would leave 60 processors of an H100 idle."""
    assert plan_tiles(*Pass(12, 256, 3, 9).sizes(KERNELS["one block"], 132)) == (0, 3)
    assert plan_tiles(*Pass(12, 256, 3, 9).sizes(KERNELS["two blocks"], 132)) == (
        0,
        3,
    )  # 216 of 264 blocks, in one wave


@pytest.mark.parametrize(
    "gpu, tokens, wanted",
    [
        ("H100", 64, (24, 1)),
        ("H100", 128, (0, 3)),
        ("A100", 390, (108, 7)),
        ("H100", 390, (120, 1)),
        ("RTX 5090", 390, (0, 4)),
        ("RTX 5090", 256, (0, 2)),
    ],
)
def test_plans_of_kernels_with_one_block_a_processor(gpu, tokens, wanted):
    """At 64 tokens a frame a merge costs more than it saves, as at 390 on an H100, which 120 tiles fill well."""
    assert plan_tiles(*Pass(12, tokens, 3, 9).sizes(KERNELS["one block"], PROCESSORS[gpu])) == wanted


def test_one_query_over_a_long_past_is_shared_as_far_as_it_goes():
    assert plan_tiles(1, 100_000, 128, 132, 1) == (0, MOST_SHARES)
    assert plan_tiles(1, 10 * 128, 128, 132, 1) == (0, 5)  # two tiles each
    assert plan_tiles(1, 5 * 128, 128, 132, 1) == (1, 1)  # two shares save two tiles: what a merge's launch takes


GRID = [
    (row_tiles, keys, kernel.tile_keys, processors, kernel.per_processor)
    for row_tiles, keys, kernel, processors in itertools.product(
        (1, 12, 72, 107, 120, 132, 156, 300, 444, 1480),
        (1, 204, 576, 2304, 14040),
        KERNELS.values(),
        PROCESSORS.values(),
    )
]


def test_a_plan_is_the_cheapest_by_its_own_measure():
    """Of all numbers of shares, for the tiles after whole waves; the merge is counted."""
    for row_tiles, keys, tile_keys, *rest in GRID:
        plan = plan_tiles(row_tiles, keys, tile_keys, *rest)
        full = row_tiles // (rest[0] * rest[1]) * rest[0] * rest[1]
        assert plan == (row_tiles, 1) or (plan.whole == full < row_tiles and 2 * tile_keys * plan.shares <= keys)
        others = [TilePlan(full, n) for n in range(2, min(MOST_SHARES, keys // (2 * tile_keys)) + 1)]
        for other in [TilePlan(row_tiles, 1), *(others if full < row_tiles else ())]:
            assert plan_time(plan, row_tiles, keys, tile_keys, *rest) <= plan_time(
                other, row_tiles, keys, tile_keys, *rest
            )


def test_equals_cpp():
    for sizes in GRID:
        assert plan_tiles(*sizes) == twins.plan_tiles(*sizes), sizes
