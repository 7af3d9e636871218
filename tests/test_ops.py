"""What the operators promise below and around the numbers: opcheck, torch.compile, no value read by the host."""

import contextlib
import math
import re
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch._inductor.utils
from patched import exact_backends, own_backends
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rfkernels as rf
from rfkernels import attention, backends, native
from rfkernels.backends.sdpa import dense
from rfkernels.contract.geometry import WindowMask
from rfkernels.contract.ops import NATIVE, OPERATIONS
from rfkernels.contract.requests import (
    BeginChunk,
    ChunkAttention,
    ChunkGradients,
    Cotangents,
    MergeAttention,
    Past,
    ReDMD,
    Rotate,
    StreamingAttention,
    WindowAttention,
    WindowGradients,
)
from rfkernels.contract.schemas import flattener

ops = torch.ops.rfkernels
HEAD_DIM = 32  # the least that every backend serves
FAKE_CUDA_TORCH = (2, 11)  # the oldest that it was tried with


def make(device, layers=1, batch=2, dtype=torch.float32, frames=2, chunks=4, size=(2, 2), window=3):
    cache = rf.EMASinkCache(
        num_layers=layers, batch_size=batch, num_kv_heads=2, head_dim=HEAD_DIM, frame_tokens=size[0] * size[1],
        sink_frames=2, window_frames=window, alpha=0.9, rope=rf.Rope3D(HEAD_DIM, *size), dtype=dtype, device=device,
    )  # fmt: skip
    for _ in range(chunks):
        cache.begin_chunk(frames)
        for layer in cache:
            layer.write(*qkv(cache, frames)[1:])
    return cache


def qkv(cache, frames, grad=False, heads=2):
    tokens = frames * cache.frame_tokens
    shapes = [(cache.batch_size, tokens, n, HEAD_DIM) for n in (heads, 2, 2)]
    return [torch.randn(s, dtype=cache.dtype, device=cache.device).requires_grad_(grad) for s in shapes]


# --- opcheck ----------------------------------------------------------------------------------------------------------


def begin(cache, new_frames, advancing=None, before_window=True) -> BeginChunk:
    return BeginChunk(
        cache._tensors, cache.num_frames, new_frames, advancing, cache._decay, cache._rope_tables, cache._geometry,
        before_window,
    )  # fmt: skip


def requests(device):
    """(op, request) of every public op that has backends, in several layouts."""
    cache = make(device)
    rope, geometry = cache._rope_tables, cache._geometry
    q, k, v = qkv(cache, 2, grad=True, heads=4)
    past = cache[0].context().past
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k, v)]
    plain = [x.detach() for x in (q, k, v)]
    lse = torch.randn(2, 4, 8, device=device)
    x, fake, cond, uncond = (torch.randn(2, 3, 4, device=device) for _ in range(4))
    yield "begin_chunk", begin(cache, 2)
    yield "begin_chunk", begin(cache, 1, torch.tensor([True, False], device=device), before_window=False)
    write = cache[0]._write_request(*plain[1:])
    yield "write", write
    for full, return_lse in ((True, False), (False, True)):
        yield "streaming_attention", StreamingAttention(plain[0], write, 0.3, full, return_lse)
    mask = WindowMask(2, 4, 2, 1, True)
    for tensors in ((q, k, v), strided):
        yield "chunk_attention", ChunkAttention(*tensors, past, rope, geometry, 0.3)
        yield "sink_window_attention", WindowAttention(*tensors, mask, None, 0.3)
    incoming = Cotangents(plain[0], lse, plain[0], lse)
    yield "chunk_attention_backward", ChunkGradients(incoming, ChunkAttention(*plain, past, rope, geometry, 0.3))
    yield "sink_window_attention_backward", WindowGradients(incoming, WindowAttention(*plain, mask, None, 0.3))
    weight = x[:, 0, 0].contiguous()
    yield "redmd_loss", ReDMD(x.clone().requires_grad_(), fake, cond, uncond, None, weight, x > 0, 3.0, 0.0, True)
    yield "redmd_loss", ReDMD(x, fake, cond, None, None, weight, None, 3.0, 0.0, False)


def test_opcheck_with_all_utilities(device, backend):
    seen = set()
    for name, request in requests(device):
        op = getattr(ops, name).default
        names = [argument.name for argument in op._schema.arguments if argument.name.endswith("backend")]
        head_dim = None if name == "redmd_loss" else HEAD_DIM
        chosen = backends.choose(name, device, torch.float32, head_dim, backend).backend
        torch.library.opcheck(op, (*flattener(type(request))(request), *(chosen for _ in names)))
        seen.add(name)
    assert seen == set(OPERATIONS)


def test_opcheck_of_merging(device):
    out, lse = torch.randn(2, 8, 4, HEAD_DIM, device=device, requires_grad=True), torch.randn(2, 4, 8, device=device)
    other = (out.detach() * 2).requires_grad_()
    torch.library.opcheck(ops.merge_attention.default, tuple(MergeAttention(out, lse, other, lse + 1)))


@pytest.mark.skipif(native.missing is not None, reason=str(native.missing))
def test_opcheck_of_the_compiled_ops():
    calls = {name: request for name, request in requests(torch.device("cpu")) if name in NATIVE}
    x, rope = torch.randn(2, 8, 2, HEAD_DIM), make("cpu")._rope_tables
    calls["rotate"] = Rotate(x, torch.tensor([[5, 6]]), 0, rope, False, torch.bfloat16)
    assert set(calls) == set(NATIVE)
    for name, request in calls.items():
        flat = [t.detach() if isinstance(t, torch.Tensor) else t for t in flattener(type(request))(request)]
        torch.library.opcheck(getattr(torch.ops.rfkernels_native, name).default, tuple(flat))


@pytest.mark.parametrize("rope", [True, False], ids=["rope", "no_rope"])
def test_a_request_survives_its_flat_form(device, rope):
    """Nested requests, absent ones too, come back as they were, in the order of the schema."""
    from rfkernels.contract.schemas import leaves, unflattener

    for name, request in requests(device):
        if not rope and hasattr(request, "rope"):
            request = request._replace(rope=None)
        flat = flattener(type(request))(request)
        assert len(flat) == len(leaves(type(request))) == len({leaf.name for leaf in leaves(type(request))}), name
        again = unflattener(type(request))(flat)
        assert type(again) is type(request)
        assert all(a is b for a, b in zip(flattener(type(again))(again), flat, strict=True)), name


# --- torch.compile ----------------------------------------------------------------------------------------------------


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(16, 6 * HEAD_DIM), torch.nn.Linear(2 * HEAD_DIM, 16)

    def forward(self, x, layer):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, HEAD_DIM)).unbind(2)
        return x + self.out(rf.streaming_attention(q, k, v, layer).flatten(2))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))

    def forward(self, x, cache):
        for index, block in enumerate(self.blocks):
            x = block(x, cache[index])
        return x


@contextlib.contextmanager
def count_compilations(inductor=False):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.testing.CompileCounterWithBackend("inductor" if inductor else "aot_eager")
    torch._dynamo.reset()


COMPILED = [("reference", False)] + [(name, True) for name in exact_backends() if name != "reference"]


@pytest.mark.parametrize("name, inductor", COMPILED, ids=str)
def test_a_compiled_model_streams_without_recompiling_or_copying(name, inductor, device):
    """30 chunks of 3 passes, warm-up and wrap-around included: at most two compilations, the cache updated in place."""
    chunks, passes = (6, 1) if name == "triton" and device.type == "cpu" else (30, 3)  # interpreted: a second a pass
    model, eager, compiled = Model().to(device), make(device, 3, 1, chunks=0), make(device, 3, 1, chunks=0)
    with rf.use_backend(name), count_compilations(inductor) as counter, torch.no_grad():
        fast = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(chunks):
            eager.begin_chunk(2)
            compiled.begin_chunk(2)
            for _ in range(passes):
                x = torch.randn(1, 8, 16, device=device)
                torch.testing.assert_close(fast(x, compiled), model(x, eager), rtol=1e-4, atol=1e-5)
        assert counter.frame_count <= 2
        missed = torch._dynamo.utils.counters["inductor"]
        assert not any("possibly_missed" in name and count for name, count in missed.items()), dict(missed)
    torch.testing.assert_close(compiled.k, eager.k)
    assert compiled.k.data_ptr() == compiled[0].k.data_ptr()


def test_inductor_allocates_nothing_as_large_as_the_cache(device, backend):
    """The generated code updates the cache in place: no clone of it, hence no buffer of its size."""
    model, cache = Model().to(device), make(device, 3, 1, chunks=20, window=30)
    with count_compilations() as _, torch.no_grad():
        fast = torch.compile(model, fullgraph=True)
        _, codes = torch._inductor.utils.run_and_get_code(fast, torch.randn(1, 8, 16, device=device), cache)
        (missed,) = [torch._dynamo.utils.counters["inductor"]]
    buffers = re.findall(r"empty_strided\w*\(\(([\d, ]+)\)", "".join(codes))
    sizes = [math.prod(int(n) for n in shape.split(",") if n.strip()) for shape in buffers]
    assert "rfkernels.streaming_attention" in "".join(codes)
    assert max(sizes, default=0) < cache.k[0].numel()
    assert not any("possibly_missed" in name and count for name, count in missed.items())


def test_a_compiled_block_serves_every_layer(device, backend):
    """Compiled once by itself and called with cache[0], cache[1], ...: no recompilation from layer to layer."""
    block, cache, other = Block().to(device), make(device, 3, 1, chunks=0), make(device, 3, 1, chunks=0)
    with count_compilations() as counter, torch.no_grad():
        fast = torch.compile(block, fullgraph=True, backend=counter)
        for _ in range(5):
            cache.begin_chunk(2)
            other.begin_chunk(2)
            for index in range(3):
                x = torch.randn(1, 8, 16, device=device)
                torch.testing.assert_close(fast(x, cache[index]), block(x, other[index]))
        assert counter.frame_count <= 2
    torch.testing.assert_close(cache.k, other.k)


def test_a_compiled_training_step(device, backend):
    """Contexts go into a compiled function; gradients come out of it."""

    def step(x, weight, context):
        q, k, v = (x @ weight).unflatten(-1, (3, 2, HEAD_DIM)).unbind(2)
        return rf.chunk_attention(q, k, v, context).square().sum()

    cache = make(device, batch=1, chunks=5)
    weight = torch.randn(16, 6 * HEAD_DIM, device=device, requires_grad=True)
    with count_compilations() as counter:
        fast = torch.compile(step, fullgraph=True, backend=counter)
        for _ in range(4):
            cache.begin_chunk(2)
            x, context = torch.randn(1, 8, 16, device=device), cache[0].context()
            expected = torch.autograd.grad(step(x, weight, context), weight)
            torch.testing.assert_close(torch.autograd.grad(fast(x, weight, context), weight), expected)
            cache[0].write(*qkv(cache, 2)[1:])
        assert counter.frame_count <= 2


def test_sink_window_attention_compiles(device, backend):
    rope = rf.Rope3D(HEAD_DIM, 2, 2)
    options = dict(sink_tokens=4, window_tokens=8, chunk_tokens=4, rope=rope)
    with count_compilations() as counter:
        fast = torch.compile(lambda *x: rf.sink_window_attention(*x, **options), fullgraph=True, backend=counter)
        for _ in range(4):
            q, k, v = (torch.randn(1, 24, 2, HEAD_DIM, device=device) for _ in range(3))
            torch.testing.assert_close(fast(q, k, v), rf.sink_window_attention(q, k, v, **options))
        assert counter.frame_count <= 2


# --- with and without the dispatcher ----------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize("how", ["nobody", "mode", "profiler", "subclass", "trace"])
def test_a_pass_is_an_operator_to_whoever_looks(how, device, monkeypatch):
    """The same numbers, and the same versions of what was written, whether the dispatcher was asked or not."""
    torch.manual_seed(0)
    expected, cache = make(device), make(device)
    cache.restore(expected.snapshot())
    q, k, v = qkv(expected, 2)
    dispatched, honest = [], attention.ops.streaming_attention
    monkeypatch.setattr(attention.ops, "streaming_attention", lambda *a: dispatched.append(1) or honest(*a))
    by_op = honest(
        StreamingAttention(q, expected[0]._write_request(k, v), HEAD_DIM**-0.5, expected.full, False),
        backends.choose("streaming_attention", expected.device, expected.dtype, HEAD_DIM).backend,
    )[0]
    version = cache.k._version
    with contextlib.ExitStack() as stack:
        if how == "mode":
            seen = stack.enter_context(Seen())
        elif how == "profiler":
            seen = stack.enter_context(torch.profiler.profile())
        elif how == "subclass":
            q = q.as_subclass(Subclass)
        if how == "trace":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = torch.jit.trace(lambda q: rf.streaming_attention(q, k, v, cache[0]), (q,), check_trace=False)(q)
        else:
            out = rf.streaming_attention(q, k, v, cache[0])
    assert bool(dispatched) == (how != "nobody")
    assert how != "mode" or "rfkernels.streaming_attention.default" in seen.names
    assert how != "profiler" or any("rfkernels::streaming_attention" in row.key for row in seen.key_averages())
    assert torch.equal(out, by_op) and torch.equal(cache.k, expected.k) and cache.k._version > version


# --- no value read by the host ----------------------------------------------------------------------------------------


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.nonzero.default:
            raise AssertionError(f"{func} reads a device value back to the host")
        return func(*args, **(kwargs or {}))


def run_backend_functions(module, cache, backward=True):
    """The functions of a backend below the op boundary, where outer modes and fake tensors do not see them."""
    rope, geometry = cache._rope_tables, cache._geometry
    q, k, v = qkv(cache, 2, heads=4)
    for advancing in (None, torch.ones(2, dtype=torch.bool, device=cache.device)):
        module.begin_chunk(begin(cache, 2, advancing))
    write = cache[0]._write_request(k, v)
    module.write(write)
    for full in (False, True):
        module.streaming_attention(StreamingAttention(q, write, 0.3, full, True))
        past = Past(cache.k[0, :, :12].clone(), cache.v[0, :, :12].clone(), cache.num_frames, full)
        chunk = ChunkAttention(q, k, v, past, rope, geometry, 0.3)
        out, lse = module.chunk_attention(chunk)
        if backward:
            module.chunk_attention_backward(ChunkGradients(Cotangents(out, lse, out, lse), chunk))
    for mask in (WindowMask(4, 4, 4, 4, True), WindowMask(4, 8, 1, 1, True)):
        window = WindowAttention(q, k, v, mask, rope, 0.3)
        out, lse = module.sink_window_attention(window)
        if backward:
            module.sink_window_attention_backward(WindowGradients(Cotangents(out, lse, out, lse), window))
    x, fake, cond, uncond = (torch.randn(2, 6, device=cache.device) for _ in range(4))
    weight = torch.ones(2, device=cache.device)
    module.redmd_loss(ReDMD(x, fake, cond, uncond, None, weight, x > 0, 3.0, 0.0, True))


@pytest.fixture
def device_path(monkeypatch):
    """sdpa as it runs on other devices, on CPU tensors."""
    monkeypatch.setattr(dense, "on_cpu", lambda x: False)
    monkeypatch.setattr(native, "serves", lambda x: False)


@pytest.mark.parametrize("name", [n for n in own_backends() if n != "sdpa"] + ["sdpa"])
def test_no_host_read_below_the_op_boundary(name, device_path, device):
    cache = make(device)
    with NoHostRead():
        run_backend_functions(backends.module(name), cache)


@pytest.mark.skipif(
    torch.version.cuda is None or native.torch_version() < FAKE_CUDA_TORCH,
    reason="fake CUDA tensors without a driver need a torch >= {}.{} built with CUDA".format(*FAKE_CUDA_TORCH),
)
@pytest.mark.parametrize("name", [n for n in own_backends() if n != "triton"])  # which launches on addresses
def test_no_host_read_on_fake_cuda_tensors(name):
    """Fake tensors have no values: any read, also one that a dispatch mode on the CPU would miss, raises."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        cache = make("cuda", chunks=0)
        cache.open_frames = 2
        # The reference differentiates by autograd, whose engine wants a real device.
        run_backend_functions(backends.module(name), cache, backward=name != "reference")


@pytest.mark.parametrize("name", [n for n in own_backends() if n != "reference"])
def test_a_planted_host_read_is_caught(name, device_path, device, monkeypatch):
    cache, module = make(device), backends.module(name)
    honest = module.write

    def dishonest(request):
        request.num_frames.max().item()
        honest(request)

    monkeypatch.setattr(module, "write", dishonest)
    with NoHostRead(), pytest.raises(AssertionError, match="reads a device value"):
        run_backend_functions(module, cache)


@pytest.mark.parametrize("chunks", [0, 1, 5])
def test_sdpa_on_other_devices_equals_the_reference(chunks, device_path, device):
    """The masked path, forward and backward, with streams of different ages."""
    results = []
    for name in ("sdpa", "reference"):
        torch.manual_seed(0)
        cache = make(device, dtype=torch.float64, chunks=chunks)
        for stream, age in enumerate(cache.ages):  # where no frame has been
            cache.k[:, stream, cache._geometry.valid_frames(age) * 4 :] = float("nan")
            cache.v[:, stream, cache._geometry.valid_frames(age) * 4 :] = float("nan")
        with rf.use_backend(name):
            cache.begin_chunk(2, samples=[1])
            q, k, v = qkv(cache, 2, grad=True, heads=4)
            context = cache[0].context()
            out, lse = rf.chunk_attention(q, k, v, context, return_lse=True)
            grads = torch.autograd.grad(out.sin().sum() + lse[lse.isfinite()].sum(), (q, k, v))
            with torch.no_grad():
                streamed = rf.streaming_attention(q, k, v, cache[0], return_lse=True)
            window = rf.sink_window_attention(q, k, v, sink_tokens=1, window_tokens=3, chunk_tokens=2)
            results.append([out, lse, *grads, *streamed, window, cache.k, cache.sink_v])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11, equal_nan=True)
    assert all(x.isfinite().all() for x in (results[0][0], *results[0][2:6]))
