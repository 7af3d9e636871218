"""The choice of a backend: by name, by auto, by thread, for one call; and that a backward pass keeps to it."""

import threading

import pytest
import torch
from patched import serving
from test_ops import HEAD_DIM, count_compilations, make, qkv

import rfkernels as rf
from rfkernels import backends


def test_backends_explain_themselves():
    rows = rf.explain_backends("cpu")
    assert set(rf.available_backends("cpu")) <= set(rows) and rows["auto"].startswith("on cpu: sdpa")
    assert "not measured" in rf.explain_backends("cuda")["auto"]


CPU = torch.device("cpu")


def chosen(dtype=torch.float32, head_dim=64, operation="streaming_attention", device=CPU, **options) -> str:
    return backends.choose(operation, device, dtype, head_dim, **options).backend


def test_use_backend_nests_and_restores():
    assert chosen() == "sdpa"
    with rf.use_backend("reference"):
        with rf.use_backend("auto"):
            assert chosen() == "sdpa"
        assert chosen() == "reference"
        assert chosen(backend="sdpa") == "sdpa"
    with pytest.raises(RuntimeError, match="inside"), rf.use_backend("reference"):
        raise RuntimeError("inside")
    assert chosen() == "sdpa"


def test_use_backend_blocks_may_overlap():
    """As those of two generators do; the one that was opened last and is still open decides."""
    first, second = rf.use_backend("reference"), rf.use_backend("sdpa")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert chosen() == "sdpa"
    with rf.use_backend("reference"):
        second.__exit__(None, None, None)
        assert chosen() == "reference"
    assert backends._thread.blocks == () and backends._named.backend is None


def test_use_backend_is_a_threads_own(device):
    """Two threads whose blocks overlap in time, one of them compiled: each its own backend, and none left behind."""
    steps, seen = [threading.Event() for _ in range(3)], {}
    cache = make(device, batch=1)
    inputs = qkv(cache, 2)

    def used(name):
        with torch.profiler.profile() as profile:
            seen[name] = [chosen()]
            rf.streaming_attention(*inputs, cache[0])
        seen[name].append({event.name for event in profile.events()})

    def early():
        with rf.use_backend("reference"):
            steps[0].set()
            steps[1].wait(60)
            used("early")
        steps[2].set()

    def late():
        steps[0].wait(60)
        with rf.use_backend("sdpa"):
            steps[1].set()
            steps[2].wait(60)
            used("late")

    cache.begin_chunk(2)
    threads = [threading.Thread(target=target) for target in (early, late)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen["early"][0] == "reference" and seen["late"][0] == "sdpa"
    assert "aten::logsumexp" in seen["early"][1] and "aten::logsumexp" not in seen["late"][1]
    assert backends._thread.blocks == () and chosen() == "sdpa"


def test_compiled_code_follows_use_backend_by_thread():
    """A change of the named backend is guarded: compiled once for each, also when another thread calls."""

    def step(q, k, v):
        return rf.sink_window_attention(q, k, v, sink_tokens=1, window_tokens=4)

    inputs = [torch.randn(1, 8, 2, HEAD_DIM) for _ in range(3)]
    with count_compilations() as counter:
        fast = torch.compile(step, fullgraph=True, backend=counter)
        used = []

        def call():
            before = counter.frame_count
            fast(*inputs)
            used.append(counter.frame_count - before)

        for name in ("auto", "reference", "auto", "reference"):
            with rf.use_backend(name):
                call()
        with rf.use_backend("reference"):
            thread = threading.Thread(target=call)
            thread.start()
            thread.join()
        call()
    assert used[:4] == [1, 1, 0, 0]
    assert backends._thread.blocks == ()


def test_a_choice_is_made_once(monkeypatch):
    """Predicates are asked when a choice is new, not in every call."""
    asked = []
    monkeypatch.setattr(backends, "_choices", {})
    monkeypatch.setattr(backends.sdpa, "unavailable", lambda device: asked.append(device))
    for _ in range(3):
        assert chosen() == "sdpa"
    assert len(asked) == 1


def test_every_function_takes_a_backend_for_one_call(device):
    cache = make(device)
    cache.begin_chunk(2, backend="reference")
    q, k, v = qkv(cache, 2)
    cache[0].write(k, v, backend="reference")
    context, options = cache[0].context(), dict(sink_tokens=1, window_tokens=3, backend="reference")
    for call in (
        lambda: rf.streaming_attention(q, k, v, cache[0], backend="reference"),
        lambda: rf.chunk_attention(q, k, v, context, backend="reference"),
        lambda: rf.sink_window_attention(q, k, v, **options),
    ):
        with rf.use_backend("reference"):
            expected = call()
        assert torch.equal(call(), expected)
    with pytest.raises(ValueError, match=r"backend must be one of .* got 'fast'"):
        rf.chunk_attention(q, k, v, context, backend="fast")


def test_backward_uses_the_backend_of_the_forward(device, monkeypatch):
    called = []
    original = backends.reference.chunk_attention_backward
    monkeypatch.setattr(backends.reference, "chunk_attention_backward", lambda *a: called.append(1) or original(*a))
    cache = make(device)
    q, k, v = qkv(cache, 2, grad=True)
    with rf.use_backend("reference"):
        out = rf.chunk_attention(q, k, v, cache[0].context())
    out.sum().backward()
    assert called


def test_auto_takes_the_next_backend_that_serves_the_dtype_and_head_dim(monkeypatch):
    """float64 and odd head sizes where the first choice has no kernels for them; a named backend never falls back."""
    row = backends.Row
    monkeypatch.setitem(backends._AUTO, "cpu", dict.fromkeys(backends.OPERATIONS, (row("triton"), row("sdpa"))))
    with serving("triton"):
        assert chosen(torch.bfloat16, 128) == "triton"
        assert chosen(torch.float64, 128) == chosen(torch.bfloat16, 40) == "sdpa"
        with rf.use_backend("triton"):
            with pytest.raises(ValueError, match=r"'triton' cannot do this: .* got torch.float64"):
                chosen(torch.float64, 128)
            with pytest.raises(ValueError, match=r"multiple of 16 in 32..256, got 40"):
                chosen(torch.bfloat16, 40)


GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    "major, generation, forward, backward",
    [
        (8, "mma.sync", "cuda", "cuda"),
        (9, "wgmma", "cuda", "triton"),
        (9, "mma.sync", "triton", "triton"),
        (10, "mma.sync", "triton", "triton"),
        (12, "mma.sync", "cuda", "cuda"),
    ],
    ids=["a100", "h100", "h100_built_for_9.0", "b200", "rtx5090"],
)
def test_auto_by_family_of_architecture_and_operation(monkeypatch, major, generation, forward, backward):
    monkeypatch.setattr(backends, "family", lambda device: f"cuda {major}.x")
    with serving("triton", "cuda"):
        monkeypatch.setattr(backends.cuda, "unsupported", lambda operation, dtype, head_dim: None)
        monkeypatch.setattr(backends.cuda, "forward_kernels", lambda device: generation)
        kind = dict(dtype=torch.bfloat16, head_dim=128, device=GPU)
        assert chosen(**kind) == chosen(**kind, operation="sink_window_attention") == forward
        assert chosen(**kind, operation="chunk_attention_backward") == backward
        with rf.use_backend("cuda"):
            assert chosen(**kind, operation="chunk_attention_backward") == "cuda"
        rows = rf.explain_backends(GPU)
    assert "not measured" in rows["auto"] and f"cuda {major}.x" in rows["auto"]
