"""Passes as CUDA graphs. Without a GPU a tape stands in, which freezes what a graph freezes (`tape.py`)."""

import contextlib
import functools
import itertools

import pytest
import torch
from tape import Tapes
from test_model import small
from test_sampler import frames, make, prompt

import rfkernels as rf
from benchmarks import counter
from rfkernels import addresses, backends
from rfkernels.backends import sdpa
from rfkernels.models import graphs

CPU = torch.device("cpu")


@pytest.fixture
def taped(monkeypatch):
    """On a CPU; "device": the sdpa backend as it runs on other devices."""
    if torch.cuda.is_available():
        pytest.skip("a GPU records graphs: below")
    monkeypatch.setattr(graphs, "CudaGraphs", Tapes)
    monkeypatch.setattr(graphs, "_check", lambda model, device: None)


@contextlib.contextmanager
def served_by(name, monkeypatch):
    with contextlib.ExitStack() as stack:
        if name == "device":
            stack.enter_context(counter.as_a_device())
            monkeypatch.setattr(sdpa, "reads_full", lambda device: True)
            monkeypatch.setattr(backends, "_choices", {})
        stack.enter_context(rf.use_backend("sdpa" if name == "device" else name))
        yield


def recorded(sampler) -> int:
    return len(sampler._graphs._graphs.recorded)


def life(sampler, model) -> list[torch.Tensor]:
    """A first chunk of its own length, warm-up, a wrapped ring, another prompt, a branch, another video."""
    outs = list(sampler.stream(prompt(model), 13, seed=3))
    saved = sampler.snapshot()
    sampler.switch(prompt(model, seed=1))
    outs += sampler.stream(num_frames=4)
    outs.append(sampler.step(steps=(1000,)))
    sampler.restore(saved)
    outs += sampler.stream(num_frames=6)
    source = torch.ones(1, 2, 4, 4, 4, dtype=sampler.dtype, device=sampler.cache.device)
    outs.append(sampler.step(prompt(model, seed=2), source, 0.7))
    sampler.reset()
    outs += sampler.stream(prompt(model, seed=4), 7)
    return [*outs, sampler.cache.k, sampler.cache.sink_v]


@pytest.mark.parametrize("name, kinds", [("reference", 2), ("sdpa", 2), ("device", 3)])
def test_replays_are_the_passes(name, kinds, taped, monkeypatch):
    """Bit for bit, from one recording a length (1 frame, 2 frames); and one more where a full ring needs no mask.

    The window of a switched prompt is recomputed by one pass: the first of its kind, which is not recorded.
    """
    model = small(CPU, torch.float32)
    with served_by(name, monkeypatch):
        plain = life(make(model, first_chunk_frames=1), model)
        sampler = make(model, first_chunk_frames=1, cuda_graph=True)
        replayed = life(sampler, model)
        assert len(plain) == len(replayed) and all(map(torch.equal, replayed, plain))
        assert recorded(sampler) == kinds


def test_a_batch_of_streams_of_different_ages(taped):
    model = small(CPU, torch.float32)
    results = []
    for option in (False, True):
        sampler = make(model, 2, cuda_graph=option)
        outs = list(sampler.stream(prompt(model, 2), 6))
        sampler.cache.reset(samples=[1])
        outs += sampler.stream(num_frames=6)
        results.append(outs)
    assert all(map(torch.equal, *results))


def test_what_the_host_would_decide_anew_is_frozen(taped):
    """The comparison can fail: a model whose host code reads the stream's age does something else when replayed."""
    results = []
    for option in (False, True):
        model = small(CPU, torch.float32)
        sampler = make(model, cuda_graph=option)
        model.head.register_forward_hook(lambda _, __, out, cache=sampler.cache: out + cache.ages[0])
        results.append(frames(sampler, prompt(model), 8))
    assert not torch.allclose(*results)


def test_a_host_read_cannot_be_recorded(taped):
    model = small(CPU, torch.float32)
    model.head.register_forward_hook(lambda _, __, out: out * float(out.abs().max() > 0))
    with pytest.raises(AssertionError, match="reads a device value"):
        list(make(model, cuda_graph=True).stream(prompt(model), 2))


@pytest.mark.parametrize("change", ["in place", "moved", "mode", "hidden layer"])
def test_recordings_follow_the_model(change, taped):
    """Values that change in place are read anew; a tensor that has moved, and training mode, drop the recordings."""
    model = small(CPU, torch.float32)
    sampler = make(model, cuda_graph=True)
    list(sampler.stream(prompt(model), 4))
    before = recorded(sampler)
    linear = model.blocks[0].ffn[0]
    with torch.no_grad():
        if change == "in place":
            linear.weight.mul_(1.5)
        elif change == "moved":
            linear.weight = torch.nn.Parameter(linear.weight * 1.5)
        elif change == "mode":
            model.train(not model.training)
        else:
            model.blocks[0].ffn[0] = torch.nn.Sequential(
                linear, torch.nn.Linear(linear.out_features, linear.out_features)
            )
    fresh = make(model)
    fresh.restore(sampler.snapshot())
    again = [frames(s, prompt(model), 4) for s in (sampler, fresh)]
    assert torch.equal(*again)
    assert recorded(sampler) == before + (change != "in place")


def test_recordings_follow_a_lora(taped):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q", "v"], init_lora_weights=False)
    model = peft.get_peft_model(small(CPU, torch.float32), config)
    sampler = make(model, cuda_graph=True)
    list(sampler.stream(prompt(model), 4))
    before = recorded(sampler)
    with model.disable_adapter():
        plain = make(model)
        plain.restore(sampler.snapshot())
        assert torch.equal(*(frames(s, prompt(model), 2) for s in (sampler, plain)))
    assert recorded(sampler) == before + 1
    plain.restore(sampler.snapshot())
    assert torch.equal(*(frames(s, prompt(model), 2) for s in (sampler, plain)))


def test_a_prompt_of_another_length_is_another_kind(taped):
    model = small(CPU, torch.float32)
    results = []
    for option in (False, True):
        sampler = make(model, cuda_graph=option)
        outs = list(sampler.stream(prompt(model), 4))
        outs += sampler.stream(prompt(model)[:, :3], 4)
        outs += sampler.stream(prompt(model), 4)
        results.append(outs)
    assert all(map(torch.equal, *results)) and recorded(sampler) == 2


def test_a_failed_recording_leaves_the_stream_as_it_was(taped, monkeypatch):
    model = small(CPU, torch.float32)
    expected = frames(make(model), prompt(model), 6)
    sampler = make(model, cuda_graph=True)
    honest, calls = Tapes.record, itertools.count()

    def fails(self, function):
        if next(calls) == 0:
            raise torch.OutOfMemoryError
        return honest(self, function)

    monkeypatch.setattr(Tapes, "record", fails)
    with pytest.raises(torch.OutOfMemoryError):
        sampler.step(prompt(model))
    assert torch.equal(torch.cat([sampler.step(), frames(sampler, num_frames=4)], 1), expected)


def test_no_warning_of_chunks_that_replays_wrote(taped, recwarn):
    model = small(CPU, torch.float32)
    list(make(model, cuda_graph=True).stream(prompt(model), 12))
    assert not [w for w in recwarn if "no layer has written" in str(w.message)]


# --- torch.compile's own graphs ---------------------------------------------------------------------------------------


def streaming(cache: rf.EMASinkCache, whole: bool):
    """All layers in one compiled function, or a compiled function for each."""

    def one(x, layer):
        return rf.streaming_attention(x, x, x, layer)

    def all_layers(x, cache):
        for index in range(cache.num_layers):
            x = one(x, cache[index])
        return x

    return all_layers if whole else one, cache if whole else cache[0]


def attending(device) -> tuple[rf.EMASinkCache, torch.Tensor]:
    cache = rf.EMASinkCache(
        num_layers=2, batch_size=1, num_kv_heads=2, head_dim=32, frame_tokens=4, sink_frames=2, window_frames=4,
        rope=rf.Rope3D(32, 2, 2), dtype=torch.float32, device=device,
    )  # fmt: skip
    cache.begin_chunk(2)
    return cache, torch.randn(1, 8, 2, 32, device=device)


@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
@pytest.mark.parametrize("marked", [True, False])
def test_the_compiler_knows_that_what_is_written_stays_where_it_is(marked, whole, monkeypatch):
    """Inductor skips CUDA graphs where an input is written whose address may change; without the marks it would."""
    from torch._inductor import compile_fx, cudagraph_utils

    if not marked:
        monkeypatch.setattr(addresses, "fixed", lambda *tensors: None)
    cache, x = attending(CPU)
    if not marked:
        rope = cache._rope_tables
        for tensor in (rope.frame_turns, rope.spatial):
            assert not hasattr(tensor, "_dynamo_static_input_type")
    seen = []

    def noted(gm, inputs, **options):
        compiled = compile_fx.compile_fx_inner(gm, inputs, **options)
        seen.append((gm, compiled, list(options["static_input_idxs"]), len(inputs)))
        return compiled

    inductor = functools.partial(compile_fx.compile_fx, inner_compile=noted)
    function, argument = streaming(cache, whole)
    torch._dynamo.reset()
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):  # a hit would compile nothing
        torch.compile(function, fullgraph=True, backend=inductor)(x, argument)
    torch._dynamo.reset()
    ((gm, compiled, static, inputs),) = seen
    written = set(compiled.mutated_input_idxs)
    skipped = cudagraph_utils.check_for_mutation_ignore_cuda_graph_managed_tensor(
        gm, compiled.mutated_inputs, compiled.mutated_input_idxs, static
    )
    assert written and (skipped is None) == marked
    if marked:
        assert written < set(static) and len(static) == inputs - 1  # all but x: tables and lengths are not copied


def test_marks_are_torchs_own():
    from torch._dynamo import mark_static_address

    ours, torchs = torch.zeros(2), torch.zeros(2)
    addresses.fixed(ours, None)
    mark_static_address(torchs, guard=False)
    assert vars(ours) == vars(torchs) != {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("whole", [True, False], ids=["model", "layer"])
def test_reduce_overhead_records_a_graph(whole, device, backend):
    from torch._inductor.cudagraph_trees import get_manager

    cache, x = attending(device)
    plain = attending(device)[0]
    function, argument = streaming(cache, whole)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = torch.compile(function, fullgraph=True, mode="reduce-overhead")
    expected, other = streaming(plain, whole)
    with torch.no_grad():
        for _ in range(12):
            cache.begin_chunk(2)
            plain.begin_chunk(2)
            torch.testing.assert_close(fast(x, argument), expected(x, other), rtol=2e-2, atol=2e-2)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    manager = get_manager(device.index or 0, create_if_none_exists=False)
    assert manager is not None and manager.new_graph_id().id > 0
    torch._dynamo.reset()


# --- a real device ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_cuda():
    with pytest.raises(ValueError, match="cuda_graph needs a CUDA device, the model is on cpu"):
        make(small(CPU), cuda_graph=True)


def test_a_recording_that_fails_leaves_the_stream_as_it_was(monkeypatch):
    """torch's own context manager does not: a GPU's error is raised at its end, before it restores the stream."""
    current = ["before"]

    @contextlib.contextmanager
    def capture(graph, **options):
        current[0] = options["stream"]
        yield
        raise RuntimeError("the capture is invalid")

    standing_in = {
        "graph_pool_handle": lambda: None, "Stream": lambda device: "of the capture", "CUDAGraph": object,
        "device": lambda device: contextlib.nullcontext(), "graph": capture, "current_stream": lambda: current[0],
        "set_stream": lambda stream: current.__setitem__(0, stream),
    }  # fmt: skip
    for name, function in standing_in.items():
        monkeypatch.setattr(torch.cuda, name, function)
    with pytest.raises(RuntimeError, match="the capture is invalid"):
        graphs.CudaGraphs(torch.device("cuda")).record(lambda: torch.zeros(1))
    assert current == ["before"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_graphs_on_a_gpu(dtype, device, backend):
    """The same life by real graphs and by plain passes, at a head size that every backend serves."""
    model = small(device, dtype, dim=128, num_heads=2)
    plain = life(make(model, first_chunk_frames=1), model)
    sampler = make(model, first_chunk_frames=1, cuda_graph=True)
    replayed = life(sampler, model)
    assert len(sampler._graphs._passes) == 2 + (backend == "sdpa")
    for a, b in zip(replayed, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)
