"""Streaming attention against the literal definition, over generated histories of chunks, passes and resets."""

from dataclasses import dataclass

import budget
import grid
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from literal import LiteralStream

import rfkernels as rf

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Case:
    sink: int
    window: int
    size: tuple[int, int]
    batch: int
    layers: int
    kv_heads: int
    group: int
    head_dim: int
    alpha: tuple[float, ...]
    absolute: bool
    half: bool
    rope: bool
    actions: tuple


@st.composite
def cases(draw):
    window, batch = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from([1, 2]))
    chunk = st.tuples(
        st.just("chunk"),
        st.integers(1, window),
        st.integers(0, window),  # replace, clipped to what exists
        st.integers(1, 2),
        st.one_of(st.none(), st.sets(st.integers(0, batch - 1))),
    )
    reset = st.tuples(st.just("reset"), st.one_of(st.none(), st.sets(st.integers(0, batch - 1), min_size=1)))
    alphas = st.sampled_from([0.0, 0.5, 0.9, 0.999, 1.0])
    return Case(
        sink=draw(st.integers(0, 3)),
        window=window,
        size=draw(st.sampled_from([(1, 1), (2, 2), (1, 3)])),
        batch=batch,
        layers=draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        group=draw(st.sampled_from([1, 2])),
        head_dim=draw(st.sampled_from([2, 8, 14])),
        alpha=(draw(alphas),) * kv_heads if draw(st.booleans()) else tuple(draw(alphas) for _ in range(kv_heads)),
        absolute=draw(st.booleans()),
        half=draw(st.booleans()),
        rope=draw(st.sampled_from([True, True, True, False])),
        actions=tuple(draw(st.lists(st.one_of(chunk, chunk, chunk, reset), min_size=1, max_size=9))),
    )


class Pair:
    """A cache and its literal counterparts, one for each stream of the batch, fed the same numbers."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device, seed: int = 0):
        self.case, self.dtype, self.device = case, dtype, device
        rope = rf.Rope3D(case.head_dim, *case.size, pairing="half" if case.half else "interleaved")
        self.cache = rf.EMASinkCache(
            num_layers=case.layers,
            batch_size=case.batch,
            num_kv_heads=case.kv_heads,
            head_dim=case.head_dim,
            frame_tokens=case.size[0] * case.size[1],
            sink_frames=case.sink,
            window_frames=case.window,
            alpha=case.alpha,
            rope=rope if case.rope else None,
            sink_positions="absolute" if case.absolute else "before_window",
            dtype=dtype,
            device=device,
        )
        self.streams = [
            LiteralStream(
                case.layers,
                case.sink,
                case.window,
                case.size,
                case.alpha,
                case.absolute,
                half=case.half,
                rope=case.rope,
            )
            for _ in range(case.batch)
        ]
        self.random = torch.Generator().manual_seed(seed)
        self.results = {"out": [], "lse": []}  # (ours, exact, plain PyTorch's) of every pass, for `check`

    def draw(self, tokens, heads):
        shape = (self.case.batch, tokens, heads, self.case.head_dim)
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def run(self, action):
        if action[0] == "reset":
            self.cache.reset(action[1])
            for b in range(self.case.batch) if action[1] is None else action[1]:
                self.streams[b].reset()
            return
        _, frames, replace, passes, samples = action
        chosen = range(self.case.batch) if samples is None else samples
        replace = min([replace, frames] + [self.streams[b].count for b in chosen])
        self.cache.begin_chunk(frames, replace, samples)
        for b, stream in enumerate(self.streams):
            stream.begin_chunk(frames, replace if b in chosen else frames)
        for _ in range(passes):
            for layer in range(self.case.layers):
                self.attend(frames, layer)

    def attend(self, frames, layer):
        case, tokens = self.case, frames * self.case.size[0] * self.case.size[1]
        q = self.draw(tokens, case.kv_heads * case.group)
        k, v = self.draw(tokens, case.kv_heads), self.draw(tokens, case.kv_heads)
        to = self.device
        out, lse = rf.streaming_attention(q.to(to), k.to(to), v.to(to), self.cache[layer], return_lse=True)
        assert out.dtype == self.dtype and out.is_contiguous()
        scale = case.head_dim**-0.5
        for b, stream in enumerate(self.streams):
            stream.write(layer, k[b], v[b])
            exact = stream.attend(layer, q[b], scale)
            if self.dtype == torch.float64:
                for got, want in zip((out[b], lse[b]), exact, strict=True):
                    torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-12)
            else:
                plain = stream.attend(layer, q[b], scale, self.dtype)
                self.results["out"].append((out[b], exact[0], plain[0]))
                self.results["lse"].append((lse[b].to(self.dtype), exact[1], plain[1]))

    def check(self):
        """The error budget over a whole life: the luck of plain PyTorch with two numbers is no measure."""
        for name, passes in self.results.items():
            if passes:
                flat = (torch.cat([x.flatten().cpu() for x in column]) for column in zip(*passes, strict=True))
                # The scores' own rounding bounds the normaliser: keys and queries are stored in dtype.
                budget.check(*flat, name, least=1.0 if name == "lse" else 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_streams_equal_the_literal_definition(dtype, device, backend):
    examples = 60 if dtype == torch.float64 else 25

    @settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(cases())
    def run(case):
        pair = Pair(case, dtype, device)
        for action in case.actions:
            pair.run(action)
        pair.check()

    run()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_frames_fuse_into_a_slot_in_order(dtype, device, backend):
    """Three at a time into two slots, an alpha per head, in streams that do not all advance."""
    grid.run_life(backend, device, dtype, grid.Life(2, 3, 3, (0.5, 1.0), batch=3, layers=2, kv_heads=2))


BASE = Case(2, 3, (2, 2), 1, 1, 2, 1, 8, (0.9, 0.9), False, False, True, ())


def test_two_thousand_chunks_do_not_drift(device, backend):
    pair = Pair(BASE, torch.float64, device)
    for chunk in range(2000 if backend != "reference" else 400):
        frames = 1 + chunk % 3
        pair.cache.begin_chunk(frames)
        pair.streams[0].begin_chunk(frames)
        if chunk % 100 == 99 or chunk < 5:
            pair.attend(frames, 0)
        else:
            k, v = (pair.draw(frames * 4, 2) for _ in range(2))
            pair.cache[0].write(k.to(device), v.to(device))
            pair.streams[0].write(0, k[0], v[0])


def test_a_constant_stays_where_it_is(device, backend):
    """``sink += w * (evicted - sink)`` keeps a constant; ``alpha * sink + (1 - alpha) * evicted`` would not."""
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=1, head_dim=8, frame_tokens=2, sink_frames=1, window_frames=1,
        alpha=0.999, rope=None, dtype=torch.float32, device=device,
    )  # fmt: skip
    value = torch.full((1, 2, 1, 8), 1 / 3, device=device)
    for _ in range(300):
        cache.begin_chunk(1)
        cache[0].write(value, value)
    assert torch.equal(cache.sink_v[0], value) and torch.equal(cache.sink_k[0], value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_phases_hold_at_frame_one_million(dtype, device, backend):
    """Attention of a stream that starts at frame 10**6 equals that of one that has just filled its window."""
    outs = []
    for age in (11, 10**6 + 1):  # both odd: frames fuse into the same slots
        pair = Pair(BASE, dtype, device, seed=3)
        state = pair.cache.state_dict()
        pair.cache.load_state_dict(state | {"num_frames": torch.full_like(state["num_frames"], age), "ages": [age]})
        for _ in range(4):  # more than the window: everything old is overwritten; the sinks fuse what comes after
            pair.cache.begin_chunk(3)
            q, k, v = pair.draw(12, 2), pair.draw(12, 2), pair.draw(12, 2)
            outs.append(rf.streaming_attention(q.to(device), k.to(device), v.to(device), pair.cache[0]))
    early, late = outs[:4], outs[4:]
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    for a, b in zip(early[2:], late[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_nan_in_the_unused_tail_never_leaks(device, backend):
    if device.type != "cpu" and (backend == "sdpa" or backend.startswith("library")):
        pytest.skip("on other devices torch and other packages may read it, multiplied by zero")
    for kv_heads, group in ((2, 1), (1, 2)):
        case = Case(2, 3, (2, 2), 2, 1, kv_heads, group, 8, (0.9,) * kv_heads, False, False, True, ())
        pair = Pair(case, torch.float32, device)
        pair.cache.k.fill_(torch.nan)
        pair.cache.v.fill_(torch.nan)
        for samples in (None, {0}, None, None):
            pair.run(("chunk", 2, 0, 1, samples))
        pair.check()


def test_a_float16_key_near_the_maximum_does_not_poison_the_sink(device, backend):
    pair = Pair(Case(1, 1, (1, 1), 1, 1, 1, 1, 8, (0.5,), False, False, True, ()), torch.float16, device)
    big = torch.full((1, 1, 1, 8), 65504.0, dtype=torch.float16, device=device)
    for _ in range(6):
        pair.cache.begin_chunk(1)
        out = rf.streaming_attention(big * 1e-4, big, big, pair.cache[0])
        assert out.isfinite().all()
    for x in (pair.cache.k, pair.cache.v, pair.cache.sink_k, pair.cache.sink_v):
        assert x.isfinite().all()


def test_streams_of_different_ages_equal_the_streams_alone(device, backend):
    """Bit for bit where nothing but the batch differs."""
    case = Case(2, 3, (2, 2), 3, 2, 2, 1, 8, (0.9, 0.9), False, False, True, ())
    alone = Case(2, 3, (2, 2), 1, 2, 2, 1, 8, (0.9, 0.9), False, False, True, ())
    together, singles = Pair(case, torch.float32, device), [Pair(alone, torch.float32, device) for _ in range(3)]
    plan = [{0}, {0, 1}, None, {2, 1}, None, {0}, None]
    for samples in plan:
        together.cache.begin_chunk(2, samples=samples)
        chosen = range(3) if samples is None else samples
        for b, single in enumerate(singles):
            if b in chosen:
                single.cache.begin_chunk(2)
            elif single.cache.ages[0]:
                single.cache.begin_chunk(2, reopen=2)
        for layer in range(2):
            q, k, v = (together.draw(8, 2).to(device) for _ in range(3))
            out = rf.streaming_attention(q, k, v, together.cache[layer])
            for b, single in enumerate(singles):
                if single.cache.ages[0] == 0:
                    assert not out[b].any()
                    continue
                one = slice(b, b + 1)
                expected = rf.streaming_attention(q[one], k[one], v[one], single.cache[layer])
                torch.testing.assert_close(out[one], expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("alpha", [0.999, 0.9])
def test_published_bfloat16_arithmetic(alpha, device, backend):
    """V bit for bit as ``alpha * sink + (1 - alpha) * evicted`` in bfloat16; K up to the rounding of its rotation."""
    sink, window, tokens = 3, 3, 4
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=2, head_dim=8, frame_tokens=tokens, sink_frames=sink,
        window_frames=window, alpha=alpha, rope=rf.Rope3D(8, 2, 2), dtype=torch.bfloat16, sink_dtype=torch.bfloat16,
        device=device,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    chunks = [
        tuple(torch.randn(1, 12, 2, 8, generator=random).to(device, torch.bfloat16) for _ in range(2))
        for _ in range(12)
    ]
    sink_k, sink_v = chunks[0]
    for index, (k, v) in enumerate(chunks):
        cache.begin_chunk(3)
        cache[0].write(k, v)
        if index >= 2:
            evicted_k, evicted_v = chunks[index - 1]
            sink_v = alpha * sink_v + (1 - alpha) * evicted_v
            sink_k = alpha * sink_k + (1 - alpha) * evicted_k
    assert torch.equal(cache.sink_v[0], sink_v)
    assert torch.equal(cache.v[0, :, : sink * tokens], sink_v)
    step = torch.finfo(torch.bfloat16).eps * sink_k.abs().max()
    assert (cache.sink_k[0] - sink_k).abs().max() <= 4 * step


def test_bfloat16_averaging_hardly_moves_and_float32_does(device):
    """The reason for float32 accumulators: 200 evictions at alpha = 0.999."""
    moved = {}
    for sink_dtype in (None, torch.bfloat16):
        cache = rf.EMASinkCache(
            num_layers=1, batch_size=1, num_kv_heads=1, head_dim=64, frame_tokens=16, sink_frames=1, window_frames=1,
            alpha=0.999, rope=None, dtype=torch.bfloat16, sink_dtype=sink_dtype, device=device,
        )  # fmt: skip
        random = torch.Generator().manual_seed(0)
        exact = start = None
        for frame in range(202):
            cache.begin_chunk(1)
            v = torch.randn(1, 16, 1, 64, generator=random).to(torch.bfloat16)
            cache[0].write(v.to(device), v.to(device))
            if frame == 0:
                exact = start = v.double()
            elif frame < 201:
                exact = 0.999 * exact + 0.001 * v.double()
        error = (cache.sink_v[0].cpu().double() - exact).norm() / (exact - start).norm()
        moved[sink_dtype] = error.item()
    assert moved[None] < 3e-6
    assert moved[torch.bfloat16] > 0.8


@pytest.mark.parametrize("v_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_output_has_the_dtype_of_v_and_inputs_may_mix(v_dtype, device, backend):
    cache = Pair(BASE, torch.bfloat16, device).cache
    cache.begin_chunk(2)
    q, k = torch.randn(1, 8, 2, 8, device=device), torch.randn(1, 8, 2, 8, device=device, dtype=torch.float64)
    out = rf.streaming_attention(q, k, torch.randn(1, 8, 2, 8, device=device).to(v_dtype), cache[0])
    assert out.dtype == v_dtype


def test_strided_inputs(device, backend):
    """q, k, v as they come out of a fused projection: views into one buffer."""
    pair, other = Pair(BASE, torch.float32, device), Pair(BASE, torch.float32, device)
    for _ in range(4):
        qkv = torch.randn(1, 8, 3, 2, 8, device=device)
        transposed = qkv.permute(2, 0, 3, 1, 4).contiguous()  # heads before tokens, innermost still unit
        for p in (pair, other):
            p.cache.begin_chunk(2)
        a = rf.streaming_attention(*qkv.unbind(2), pair.cache[0])
        b = rf.streaming_attention(*(x.transpose(1, 2) for x in transposed), other.cache[0])
        broken = qkv.transpose(3, 4).contiguous().transpose(3, 4)  # innermost stride 2
        c = rf.streaming_attention(*broken.unbind(2), pair.cache[0])
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_a_pass_can_be_run_again(device, backend):
    """Nothing but begin_chunk advances; the last pass decides what the next chunk sees."""
    one, two = Pair(BASE, torch.float32, device).cache, Pair(BASE, torch.float32, device).cache
    for _ in range(4):
        q, k, v = (torch.randn(1, 8, 2, 8, device=device) for _ in range(3))
        one.begin_chunk(2)
        two.begin_chunk(2)
        for _ in range(3):
            rf.streaming_attention(torch.randn_like(q), torch.randn_like(k), torch.randn_like(v), one[0])
        assert torch.equal(rf.streaming_attention(q, k, v, one[0]), rf.streaming_attention(q, k, v, two[0]))
    assert torch.equal(one.k, two.k) and torch.equal(one.v, two.v) and torch.equal(one.sink_k, two.sink_k)


def test_reopening_the_window_recomputes_it(device, backend):
    """begin_chunk(F, reopen=F): as if the frames had been written so in the first place."""
    one, two = Pair(BASE, torch.float32, device).cache, Pair(BASE, torch.float32, device).cache
    old = [tuple(torch.randn(1, 12, 2, 8, device=device) for _ in range(2)) for _ in range(4)]
    new = tuple(torch.randn(1, 12, 2, 8, device=device) for _ in range(2))
    for index, (k, v) in enumerate(old):
        for cache in (one, two):
            cache.begin_chunk(3)
            cache[0].write(*(new if cache is two and index == 3 else (k, v)))
    one.begin_chunk(3, reopen=3)
    one[0].write(*new)
    for a, b in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert a[0] == b[0] and (torch.equal(a[1], b[1]) if isinstance(a[1], torch.Tensor) else a[1] == b[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_does_not_change_the_cache(dtype):
    """Sizes that the compiled loops split among threads; every entry is written by exactly one of them."""
    caches, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        case = Case(2, 3, (8, 8), 2, 2, 2, 1, 64, (0.9, 0.9), False, False, True, ())
        pair = Pair(case, dtype, torch.device("cpu"), seed=4)
        for samples in (None, None, {0}, None, None):
            pair.cache.begin_chunk(2, samples=samples)
            for layer in pair.cache:
                q, k, v = (pair.draw(128, 2) for _ in range(3))
                rf.streaming_attention(q, k, v, layer)
        caches.append(pair.cache)
    torch.set_num_threads(threads)
    for name in ("k", "v", "sink_k", "sink_v"):
        assert torch.equal(getattr(caches[0], name), getattr(caches[1], name))
