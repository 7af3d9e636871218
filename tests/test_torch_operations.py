"""The sdpa backend by torch's operations alone, as on devices without kernels of ours; here on CPU tensors."""

import dataclasses
import gc

import grid
import pytest
import test_streaming
import torch
from hypothesis import HealthCheck, given, settings

import rfkernels as rf
from benchmarks import counter
from benchmarks.cases import CASES
from rfkernels import backends
from rfkernels.backends import reference, sdpa
from rfkernels.backends.sdpa import cache as updates
from rfkernels.backends.sdpa import dense, tables

CPU = torch.device("cpu")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float64, torch.float32, *HALVES)


@pytest.fixture(autouse=True)
def _as_a_device(monkeypatch):
    """A device also asks the host whether the ring is full."""
    monkeypatch.setattr(sdpa, "reads_full", lambda device: True)
    monkeypatch.setattr(backends, "_choices", {})
    with counter.as_a_device(), rf.use_backend("sdpa"):
        yield


# --- equal to the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams_equal_the_literal_definition(dtype):
    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(test_streaming.cases())
    def run(case):
        pair = test_streaming.Pair(case, dtype, CPU)
        for action in case.actions:
            pair.run(action)
        pair.check()

    run()


@pytest.mark.parametrize("number, life", list(enumerate(grid.LIVES)), ids=str)
def test_lives(number, life, monkeypatch):
    """Every kind of sink; also with layers one by one."""
    if number % 2:
        monkeypatch.setattr(updates, "_ELEMENTS_IN_FLIGHT", 1)
    grid.run_life("sdpa", CPU, DTYPES[1 + number % 3], life)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("pairing", ["interleaved", None])
@pytest.mark.parametrize("positions", ["before_window", "absolute"])
def test_the_published_rounding(dtype, pairing, positions):
    """Values and, where nothing is rotated, keys bit for bit."""
    life = grid.Life(2, 3, 3, (0.75, 1.0), positions, kv_heads=2, batch=3, layers=2, pairing=pairing)
    streams = grid.run_life("sdpa", CPU, dtype, life, dtype)
    assert torch.equal(streams.ours.sink_v, streams.plain.sink_v)
    if pairing is None:
        assert torch.equal(streams.ours.sink_k, streams.plain.sink_k)


@pytest.mark.parametrize("case", grid.CHUNKS[::3], ids=str)
def test_chunks_and_their_gradients(case):
    grid.run_chunk("sdpa", CPU, torch.float32, case)


@pytest.mark.parametrize("case", grid.WINDOWS[::4], ids=str)
def test_windows_and_their_gradients(case):
    grid.run_window("sdpa", CPU, torch.float32, case)


def test_more_frames_open_than_the_window_holds():
    """The buffer is exactly full and open frames lie in the sink too: these are written, whatever ``full`` says."""
    for name in ("sdpa", "reference"):
        torch.manual_seed(0)
        cache = small(dtype=torch.float64)
        with rf.use_backend(name):
            cache.begin_chunk(5)
            q, k, v = torch.randn(3, 1, 20, 2, 8, dtype=torch.float64)
            out = rf.streaming_attention(q, k, v, cache[0])
        assert cache.full
        if name == "sdpa":
            ours, sinks = out, cache.sink_k
    torch.testing.assert_close(ours, out)
    torch.testing.assert_close(sinks, cache.sink_k)


def small(**changes) -> rf.EMASinkCache:
    options = dict(
        num_layers=2, batch_size=1, num_kv_heads=2, head_dim=8, frame_tokens=4, sink_frames=2, window_frames=3,
        alpha=0.9, rope=rf.Rope3D(8, 2, 2), dtype=torch.float32, device="cpu",
    )  # fmt: skip
    return rf.EMASinkCache(**options | changes)


def advance(cache: rf.EMASinkCache, chunks: int, frames: int = 2) -> list[torch.Tensor]:
    outs = []
    for _ in range(chunks):
        cache.begin_chunk(frames)
        for layer in cache:
            q, k, v = torch.randn(3, cache.batch_size, 4 * frames, 2, 8, dtype=cache.dtype)
            outs.append(rf.streaming_attention(q, k, v, layer))
    return outs


@pytest.mark.parametrize("what", ["begin", "reset", "restore"])
def test_want_of_memory_for_what_passes_share(what, monkeypatch):
    """It is computed before anything changes."""
    cache = small(batch_size=2)
    advance(cache, 4)
    saved = cache.snapshot()
    advance(cache, 1)
    before = cache.snapshot()

    def fails(*arguments):
        raise MemoryError

    calls = {
        "begin": lambda: cache.begin_chunk(2),
        "reset": lambda: cache.reset(samples=[1]),
        "restore": lambda: cache.restore(saved),
    }
    monkeypatch.setattr(tables, "_computed", fails)
    with pytest.raises(MemoryError):
        calls[what]()
    after = cache.snapshot()
    assert all(torch.equal(x, after[n]) if isinstance(x, torch.Tensor) else x == after[n] for n, x in before.items())


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_chunk_that_could_not_begin_begins_again(failing, monkeypatch):
    """Want of memory in the first layer's sums or images: the cache is as it was."""
    monkeypatch.setattr(updates, "_ELEMENTS_IN_FLIGHT", 1)
    cache = small(dtype=torch.bfloat16)
    advance(cache, 4)
    other, before = small(dtype=torch.bfloat16), cache.snapshot()
    other.restore(before)
    calls, honest = iter(range(100)), updates.turned

    def fails(*arguments):
        if next(calls) == failing:
            raise MemoryError
        return honest(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(updates, "turned", fails)
        with pytest.raises(MemoryError):
            cache.begin_chunk(2)
    after = cache.snapshot()
    assert all(torch.equal(x, after[n]) for n, x in before.items() if isinstance(x, torch.Tensor))
    assert after["ages"] == before["ages"]
    cache.begin_chunk(2)
    other.begin_chunk(2)
    assert torch.equal(cache.k, other.k) and torch.equal(cache.sink_k, other.sink_k)


# --- what the passes over a chunk share -------------------------------------------------------------------------------


def kept(cache: rf.EMASinkCache) -> tables.ChunkTables:
    return tables._kept[cache.num_frames][cache.open_frames].tables


def addresses(cache: rf.EMASinkCache) -> list[int]:
    return [x.data_ptr() for x in tables._tensors(kept(cache))]


def test_tables_keep_their_addresses_and_follow_the_stream():
    """A graph that was captured in one chunk reads what the next one, a reset or a restored state has left there."""
    cache = small(batch_size=2)
    advance(cache, 4)
    first, saved = addresses(cache), cache.snapshot()
    steps = [
        lambda: cache.begin_chunk(2),
        lambda: cache.begin_chunk(2, samples=[1]),
        lambda: cache.reset(samples=[0]),
        lambda: cache.restore(saved),
        lambda: cache.begin_chunk(2, backend="reference"),
    ]
    for step in steps:
        step()
        assert addresses(cache) == first
        fresh = tables._computed(cache.num_frames, 2, cache._rope_tables, cache._geometry)
        assert all(map(torch.equal, tables._tensors(kept(cache)), tables._tensors(fresh)))
        assert tables.chunk_tables(cache.num_frames, 2, cache._rope_tables, cache._geometry) is kept(cache)
    with torch.inference_mode():
        cache.begin_chunk(3)
    cache.begin_chunk(3)  # which writes in place into what was made there
    assert not any(x.is_inference() for x in tables._tensors(kept(cache)))


def test_tables_that_are_out_of_date_are_not_used():
    cache = small()
    advance(cache, 3)
    for x in tables._tensors(kept(cache)):
        x.fill_(1)
    assert tables.chunk_tables(cache.num_frames, 2, cache._rope_tables, cache._geometry) is kept(cache)
    cache.num_frames.add_(1)
    found = tables.chunk_tables(cache.num_frames, 2, cache._rope_tables, cache._geometry)
    assert found is not kept(cache) and found.frames.tolist() == [[5, 6]]
    other = rf.Rope3D(8, 2, 2, theta=100.0).tables(CPU, torch.float32)
    cache.begin_chunk(2, reopen=2)
    assert tables.chunk_tables(cache.num_frames, 2, other, cache._geometry) is not kept(cache)


def test_tables_go_with_their_cache():
    gc.collect()
    before = len(tables._kept)
    cache = small()
    advance(cache, 1)
    assert len(tables._kept) == before + 1
    del cache
    gc.collect()
    assert len(tables._kept) == before


# --- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_chunk_costs_no_more_than_by_the_usual_procedure(dtype):
    """Launches, bytes and temporary memory at the paper's shape; a third of its layers, which are all alike."""
    case = dataclasses.replace(CASES["paper"], layers=10, dtype=dtype)
    usual, ours = (counter.count(make, case) for make in (counter.usual_chunk, counter.our_chunk))
    assert ours.host_reads == 0
    for name in ("launches", "read", "written", "peak"):
        assert getattr(ours, name) <= getattr(usual, name), name


def test_a_full_ring_needs_no_mask(monkeypatch):
    masks, honest = [], torch.nn.functional.scaled_dot_product_attention

    def noted(*arguments, attn_mask=None, **options):
        masks.append(attn_mask)
        return honest(*arguments, attn_mask=attn_mask, **options)

    monkeypatch.setattr(dense.F, "scaled_dot_product_attention", noted)
    advance(small(), 6)
    assert [mask is None for mask in masks] == [False] * 4 + [True] * 8
    assert all(mask is None or mask.shape == (1, 1, 1, 20) for mask in masks)  # no rows: each query sees the same keys


def test_a_planted_difference_is_found(monkeypatch):
    """The comparisons above see a rotation by the wrong sign, and a frame fused into the wrong slot."""
    life = grid.Life(2, 3, 2, kv_heads=2)
    grid.run_life("sdpa", CPU, torch.float32, life)
    with monkeypatch.context() as patch:
        patch.setattr(updates, "turned", lambda x, turn, dtype: reference.store(x, dtype))
        with pytest.raises(AssertionError):
            grid.run_life("sdpa", CPU, torch.float32, life)
    groups = updates._groups
    with monkeypatch.context() as patch:
        patch.setattr(updates, "_groups", lambda *a: [g._replace(slots=g.slots.flip(1)) for g in groups(*a)])
        with pytest.raises(AssertionError):
            grid.run_life("sdpa", CPU, torch.float32, life)
