"""The streaming sampler: the published procedure, determinism, state, and streams that do not end."""

import io
import itertools
import time

import budget
import pytest
import torch
from memory import check_constant, memory
from test_model import small

from rfkernels.losses import FlowMatchSchedule
from rfkernels.models import StreamingSampler

STEPS = (1000, 500)


def make(model, batch=1, **changes):
    options = dict(steps=STEPS, chunk_frames=2, sink_frames=2, window_frames=4, alpha=0.9, height=4, width=4) | changes
    return StreamingSampler(model, batch_size=batch, **options)


def prompt(model, batch=1, seed=0):
    return torch.randn(batch, 6, 16, generator=torch.Generator().manual_seed(seed)).to(model.device, model.dtype)


def frames(sampler, *args, **kwargs):
    return torch.cat(list(sampler.stream(*args, **kwargs)), 1)


def test_is_the_published_procedure(device):
    """Denoise, renoise, and a clean pass at t = 0, written out with the sampler's own noise."""
    model = small(device)
    sampler, context = make(model), prompt(model)
    other = make(model)
    schedule, cache = FlowMatchSchedule(5.0), other.cache
    high, low = schedule.timesteps(STEPS)
    for got in sampler.stream(context, 8):
        noise = other._noise(2)
        cache.begin_chunk(2)
        x = next(noise)
        with torch.no_grad():
            time_ = torch.full((1,), high, device=device)
            clean = x - high / 1000 * model(x, time_, context, cache)
            x = (1 - low / 1000) * clean + low / 1000 * next(noise)
            clean = x - low / 1000 * model(x, torch.full_like(time_, low), context, cache)
            model(clean, torch.zeros_like(time_), context, cache)
        other.chunk += 1
        torch.testing.assert_close(got, clean, rtol=1e-5, atol=1e-5)  # torch.full is float32


def test_noise_depends_on_seed_stream_and_chunk_only(device):
    model = small(device)
    both, alone = make(model, 2), make(model, streams=[1])
    for seed, chunk in ((0, 0), (0, 1), (7, 1)):
        both.seed = alone.seed = seed
        both.chunk = alone.chunk = chunk
        a, b = (next(s._noise(2)) for s in (both, alone))
        assert torch.equal(a[1:], b) and not torch.equal(a[:1], b)
    draws = [next(both._noise(2)).clone() for both.seed, both.chunk in itertools.product((0, 1), (0, 1))]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(draws, 2))


def test_a_batch_equals_its_streams_alone(device):
    """Eight chunks in float32: a batch is as near to float64 (same weights, same noise) as its streams alone are."""
    context, results = prompt(small(device), 2), {}
    for dtype in (torch.float64, torch.float32):
        torch.manual_seed(0)
        model, own = small(device, dtype), context.to(dtype)
        alone = [frames(make(model, streams=[i]), own[i : i + 1], 16) for i in range(2)]
        results[dtype] = frames(make(model, 2), own, 16), torch.cat(alone)
    torch.testing.assert_close(*results[torch.float64], rtol=1e-10, atol=1e-10)
    both, alone = results[torch.float32]
    budget.check(both, results[torch.float64][1], alone)


@pytest.mark.parametrize("first, total, sizes", [(None, 7, [2, 2, 2, 1]), (1, 6, [1, 2, 2, 1]), (1, 1, [1])])
def test_chunks_that_do_not_divide(first, total, sizes, device):
    model = small(device)
    sampler = make(model, first_chunk_frames=first)
    chunks = list(sampler.stream(prompt(model), total))
    assert [c.shape[1] for c in chunks] == sizes
    assert sampler.frames == total and sampler.cache.ages == [total]


def test_for_ever(device):
    model = small(device)
    chunks = list(itertools.islice(make(model).stream(prompt(model)), 9))
    assert all(c.isfinite().all() for c in chunks) and not torch.equal(chunks[-1], chunks[-2])


@pytest.mark.parametrize("length", [1, 3, 9])
def test_initial_frames_are_as_if_generated(length, device):
    """Continuing from a stream's own first frames is that stream, where the chunks are the same."""
    model = small(device)
    context = prompt(model)
    initial = torch.randn(1, length, 4, 4, 4, dtype=torch.float64).to(device)
    one, two = make(model), make(model)
    after = frames(one, context, 4, initial=initial)
    assert one.frames == length + 4 and after.shape[1] == 4
    for part in initial.split(2, 1):
        two.extend(part, context)
    assert torch.equal(after, frames(two, num_frames=4))
    assert not torch.allclose(after, frames(make(model), context, 4))


def test_continuing_a_generated_video(device):
    model = small(device)
    context = prompt(model)
    whole = frames(make(model), context, 8)
    part = make(model)
    assert torch.equal(frames(part, context, 4, initial=whole[:, :4]), whole[:, 4:])


def test_snapshot_and_restore_branch_a_stream(device):
    model = small(device)
    sampler, context = make(model), prompt(model)
    list(sampler.stream(context, 10, seed=3))
    state = sampler.snapshot()
    first = frames(sampler, num_frames=8)
    other = frames(sampler, prompt(model, seed=5), 4, seed=9)
    sampler.restore(state)
    assert sampler.seed == 3
    assert torch.equal(frames(sampler, num_frames=8), first)
    assert not torch.equal(other, first[:, :4])


@pytest.mark.parametrize("encoded", [False, True])
def test_resumes_from_disk_bit_for_bit(encoded, device):
    model = small(device, torch.float32)
    sampler, context = make(model), prompt(model)
    list(sampler.stream(model.encode_context(context) if encoded else context, 10, seed=3))
    file = io.BytesIO()
    torch.save(sampler.snapshot(), file)
    expected = frames(sampler, num_frames=6)
    file.seek(0)
    fresh = make(model)
    fresh.restore(torch.load(file, weights_only=True, map_location=device))
    assert torch.equal(frames(fresh, num_frames=6), expected)


def test_switching_the_prompt(device):
    """recompute writes the window's frames anew, in one pass over all of them under the new prompt."""
    model = small(device)
    old, new = prompt(model), prompt(model, seed=1)
    samplers = [make(model) for _ in range(3)]
    for sampler in samplers:
        list(sampler.stream(old, 10))
    by_hand = samplers[2]
    samplers[0].switch(new)
    samplers[1].switch(new, recompute=False)
    window = by_hand._recent
    assert window.shape[1] == 4
    by_hand.cache.begin_chunk(4, reopen=4)
    with torch.no_grad():
        model(window, torch.zeros(1, device=device), new, by_hand.cache)
    results = [frames(sampler, num_frames=4) for sampler in samplers[:2]] + [frames(by_hand, new, 4)]
    torch.testing.assert_close(results[0], results[2], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(results[0], results[1])
    assert all(sampler.frames == 14 and sampler.cache.ages == [14] for sampler in samplers)


def test_switching_within_a_stream(device):
    model = small(device)
    old, new = prompt(model), prompt(model, seed=1)
    plain = list(make(model).stream(old, 8))
    sampler = make(model)
    got = []
    for index, chunk in enumerate(sampler.stream(old, 8)):
        got.append(chunk)
        if index == 1:
            sampler.switch(new)
    assert torch.equal(got[1], plain[1]) and not torch.allclose(got[2], plain[2])


@pytest.mark.parametrize("alpha, absolute", [(0.9, False), (1.0, False), (1.0, True), (0.9, True)])
def test_reset(alpha, absolute, device):
    model = small(device)
    options = dict(alpha=alpha, sink_positions="absolute" if absolute else "before_window")
    sampler, context = make(model, **options), prompt(model)
    first = frames(sampler, context, 12)
    cache = sampler.cache
    sink_v = cache.sink_v.clone()
    sink_k = None if cache.sink_k is None else cache.sink_k.clone()
    sampler.reset(keep_sink=True)
    assert sampler.frames == 2 and cache.ages == [2] and sampler.chunk == 0
    torch.testing.assert_close(cache.sink_v, sink_v)
    if sink_k is not None:
        torch.testing.assert_close(cache.sink_k, sink_k)
    assert not torch.allclose(frames(sampler, num_frames=12), first)
    sampler.reset()
    assert torch.equal(frames(sampler, num_frames=12), first)


def test_source_video(device):
    """noise_scale 1 is generation from noise at the first step, whatever the source; a small one stays near it."""
    model = small(device)
    context, source = prompt(model), torch.randn(1, 2, 4, 4, 4, dtype=torch.float64).to(device)
    plain = make(model).step(context)
    torch.testing.assert_close(make(model).step(context, source, 1.0), plain)
    distances = [(make(model).step(context, source, scale) - source).norm().item() for scale in (0.01, 0.5)]
    assert distances[0] < 0.2 * distances[1]
    calls = []
    model.register_forward_pre_hook(lambda _, args: calls.append(args[1]) if args[1] is not None else None)
    make(model).step(context, source, 0.7)
    # 0.7, then the step list's timesteps below it (none: 500 is shifted to 833), then the clean pass.
    assert [round(float(t[0]), 3) for t in calls] == [700.0, 0.0]


def test_steps_generator_and_context_per_call(device):
    model = small(device)
    context = prompt(model)
    assert torch.equal(make(model).step(context, steps=(1000,)), make(model, steps=(1000,)).step(context))
    one, two = (make(model).step(context, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, make(model).step(context))
    sampler = make(model)
    with pytest.raises(ValueError, match="context must be given"):
        sampler.step()
    sampler.step(context)
    assert sampler.step().shape == (1, 2, 4, 4, 4)


def test_context_noise(device):
    """It sets the timestep of the clean pass; noise is added only when asked for."""
    model = small(device)
    results = [
        frames(make(model, context_noise=n, add_context_noise=add), prompt(model), 4)
        for n, add in ((0, False), (0, True), (100, False), (100, True))
    ]
    assert torch.equal(results[0], results[1])
    for a, b in itertools.combinations(results[1:], 2):
        assert torch.equal(a[:, :2], b[:, :2]) and not torch.allclose(a[:, 2:], b[:, 2:])


def test_a_chunk_that_failed_is_taken_up_again(device):
    model = small(device)
    context = prompt(model)
    expected = list(make(model).stream(context, 10))
    sampler, calls = make(model), itertools.count()

    def fail(*_):
        if next(calls) == 13:  # in the fifth chunk: the prompt, then three passes each
            raise MemoryError

    handle = model.register_forward_pre_hook(fail)
    got = []
    with pytest.raises(MemoryError):
        got.extend(sampler.step(context) for _ in range(5))
    handle.remove()
    with pytest.raises(ValueError, match="frames must be 2"):
        sampler.step(frames=1)
    assert torch.equal(sampler.step(), expected[4])


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(source=torch.zeros(1, 2, 3, 4, 4), noise_scale=0.5), "channels=4"),
        (dict(source=torch.zeros(1, 5, 4, 4, 4), noise_scale=0.5), "frames must be in 1..4"),
        (dict(source=torch.zeros(1, 2, 4, 4, 4)), "go together"),
        (dict(source=torch.zeros(1, 2, 4, 4, 4), noise_scale=1.5), "noise_scale"),
        (dict(noise_scale=0.5), "go together"),
        (dict(frames=5), "frames must be in 1..4"),
        (dict(steps=(250, 500)), "steps must fall"),
        (dict(context=torch.zeros(2, 6, 16)), "batch_size=1"),
        (dict(context=torch.zeros(1, 6, 17)), "text_dim=16"),
    ],
)
def test_bad_calls_change_nothing(call, message, device):
    model = small(device)
    sampler = make(model)
    sampler.step(prompt(model))
    before = sampler.snapshot()
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    with pytest.raises(ValueError, match=message):
        sampler.step(**moved)
    after = sampler.snapshot()
    assert before["counts"] == after["counts"] and torch.equal(before["context"], after["context"])
    assert all(torch.equal(before["cache"][n], after["cache"][n]) for n in ("k", "v", "num_frames"))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(window_frames=1), "window_frames must be at least 2"),
        (dict(chunk_frames=0), "chunk_frames"),
        (dict(first_chunk_frames=9), "first_chunk_frames"),
        (dict(height=5), "divisible"),
        (dict(streams=[0, 1]), "streams"),
        (dict(steps=()), "steps"),
        (dict(context_noise=-1), "context_noise"),
        (dict(alpha=2), "alpha"),
    ],
)
def test_bad_samplers(changes, message, device):
    with pytest.raises(ValueError, match=message):
        make(small(device), **changes)


def test_restoring_another_samplers_state(device):
    model = small(device)
    sampler = make(model)
    list(sampler.stream(prompt(model), 4))
    before = sampler.snapshot()
    for other, message in ((make(model, height=8), "snapshot must be of"), (make(model, alpha=0.5), "alpha")):
        with pytest.raises(ValueError, match=message):
            sampler.restore(other.snapshot())
    with pytest.raises(ValueError, match="entries"):
        sampler.restore({})
    assert before["counts"] == sampler.snapshot()["counts"]


def long_stream(device, chunks):
    """`memory` and the median seconds of a chunk, early and late in a stream of a tiny model."""
    model = small(device, torch.float32)
    sampler, seen, times = make(model), [], []
    clock = time.perf_counter()
    for index, _ in enumerate(sampler.stream(prompt(model), 2 * chunks)):
        times.append(time.perf_counter() - clock)
        if index in (chunks // 4, chunks - 1):
            seen.append(memory())
        clock = time.perf_counter()
    quarter = chunks // 4
    return seen, sorted(times[:quarter])[quarter // 2], sorted(times[-quarter:])[quarter // 2]


def check_long_stream(device, chunks):
    first, last = check_constant(long_stream, device, chunks)
    print(f"{2 * chunks} frames: median chunk {first * 1e3:.2f} ms early, {last * 1e3:.2f} ms late")


def test_memory_is_constant(device):
    check_long_stream(device, 60)


@pytest.mark.slow
def test_memory_is_constant_over_2000_frames(device):
    check_long_stream(device, 1000)


@pytest.mark.parametrize("how", ["reset", "again", "next chunk", "in place"])
def test_a_prompt_is_encoded_by_the_weights_in_force(how, device):
    """After an optimiser step, a load, or a change of the prompt itself: as a fresh sampler would."""
    model = small(device)
    sampler, context = make(model), prompt(model)
    list(sampler.stream(context, 2, seed=0))
    with torch.no_grad():
        if how == "in place":
            context.mul_(1.5)
        else:
            for p in model.parameters():
                p.mul_(1.2)
    fresh = make(model)
    if how in ("reset", "in place"):
        sampler.reset()
        assert torch.equal(frames(sampler, context, 4, seed=0), frames(fresh, context, 4, seed=0))
        return
    fresh.restore(sampler.snapshot())
    following = sampler.step(context) if how == "again" else sampler.step()
    assert torch.equal(following, fresh.step(context.clone()))


def test_video_that_goes_on_is_cut_as_the_stream_is(device):
    sampler, seen = make(small(device), first_chunk_frames=1, chunk_frames=3), []
    begin = sampler.cache.begin_chunk
    sampler.cache.begin_chunk = lambda frames, *a, **k: (seen.append(frames), begin(frames, *a, **k))[1]
    sampler.extend(torch.randn(1, 7, *sampler.shape, device=device), prompt(sampler.model))
    assert seen == [1, 3, 3]


def test_a_text_and_a_wrapped_model(device):
    model = small(device)
    wrapped = make(torch.nn.DataParallel(model))
    assert wrapped.model is model
    with pytest.raises(TypeError, match=r"context must be text embeddings .* got text: encode it first"):
        wrapped.stream("a cat")
    with pytest.raises(TypeError, match=r"model must be a CausalWan, .* got Linear"):
        make(torch.nn.Linear(2, 2))
