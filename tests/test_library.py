"""The backend that attends by other packages: torch's own kernel for real, the others by stand-ins of their signatures.

On a GPU the grid of every backend (`backend` in conftest.py, `test_smoke.py`) runs what is installed.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from unittest import mock

import grid
import oracle
import pytest
import torch
from test_ops import FAKE_CUDA_TORCH, NoHostRead
from torch._subclasses.fake_tensor import FakeTensorMode

import rfkernels as rf
from rfkernels import backends, native
from rfkernels.backends import library, reference
from rfkernels.backends.sdpa import dense
from rfkernels.contract.requests import StreamingAttention

STANDINS = Path(__file__).parent / "standins"
BY_NAME = {kernel.name: kernel for kernel in library.KERNELS}
PACKAGES = ("flash_attn_2", "flash_attn_3", "flash_attn_4", "torch_varlen", "sage_attention")
HEADS = {"head_dim": 32, "size": (2, 3)}
LIVES = (
    grid.Life(1, 3, 2, 0.5, batch=3, group=2, kv_heads=2, **HEADS),  # streams of different ages, some too young
    grid.Life(0, 3, 1, 0.5, layers=2, pairing="half", **HEADS),
    grid.Life(2, 3, 3, 1.0, positions="absolute", pairing=None, **HEADS),
)


def forget(kernel):
    for name in ("function", "fault"):
        kernel.__dict__.pop(name, None)


@pytest.fixture
def standins(monkeypatch):
    """The packages can be imported; adapters say that they run here. The calls, in order."""
    monkeypatch.setattr(backends, "_choices", {})
    for name in list(sys.modules):  # where the real ones are installed
        if name.partition(".")[0] in ("flash_attn", "flash_attn_interface", "sageattention"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(STANDINS))
    before = set(sys.modules)
    kernels = [BY_NAME[name] for name in PACKAGES]
    for kernel in kernels:
        forget(kernel)
        monkeypatch.setattr(kernel, "unavailable", lambda device, kernel=kernel: kernel.not_found() or kernel.fault)
        monkeypatch.setattr(kernel, "head_dims_on", lambda device, kernel=kernel: kernel.head_dims)
    from flash_attn import standin

    if BY_NAME["torch_varlen"].not_found() is None:
        import varlen

        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen.varlen_attn)
    yield standin.CALLS
    for kernel in kernels:
        forget(kernel)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(STANDINS) in str(sys.modules[name].__file__):
            del sys.modules[name]


def required(name: str) -> str:
    """The backend of a kernel that works here or is stood in for."""
    if (reason := BY_NAME[name].not_found()) is not None:
        pytest.skip(reason)
    return f"library:{name}"


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("life", grid.LIVES[::4], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_torchs_own_attention(dtype, life):
    grid.run_life("library", torch.device("cpu"), dtype, life)


@pytest.mark.parametrize("life", LIVES, ids=str)
@pytest.mark.parametrize("name", PACKAGES)
def test_a_life_by_stand_ins(standins, name, life):
    """Every length, streams of all ages, and NaN where no frame has been."""
    grid.run_life(required(name), torch.device("cpu"), torch.bfloat16, life)
    if BY_NAME[name].takes_lengths(torch.device("cpu")):
        assert set(standins) == {name}
    else:
        assert not standins, "it knows no lengths, and the CPU does not say that a window is full"


@pytest.mark.parametrize("scale", [0.3, 0.0, -0.2])
@pytest.mark.parametrize("name", (*PACKAGES, "torch_sdpa"))
def test_a_full_window(standins, monkeypatch, name, scale):
    """As on a GPU: the host knows that it is full, and no length is given. Any scale, normaliser or not."""
    backend = required(name)
    monkeypatch.setattr(library.Library, "reads_full", lambda self, device: True)
    streams = oracle.Streams(
        backend, torch.device("cpu"), torch.bfloat16, rf.Rope3D(32, 2, 3), num_layers=1, batch_size=2, num_kv_heads=2,
        frame_tokens=6, sink_frames=1, window_frames=2, alpha=0.5,
    )  # fmt: skip
    for _ in range(3):
        streams.begin(2)
        streams.write()
    standins.clear()
    qkv, results = streams.inputs(4), []
    for run, cache, dtype in streams.runs():
        inputs = [x.to(dtype) for x in qkv]
        with rf.use_backend(run):
            results.append(rf.streaming_attention(*inputs, cache[0], scale=scale, return_lse=True))
            assert torch.equal(rf.streaming_attention(*inputs, cache[0], scale=scale), results[-1][0])
    for what, *triple in zip(("out", "lse"), *results, strict=True):
        oracle.check(what, *triple, torch.bfloat16)
    assert standins == ([name] * 2 if name in PACKAGES else [])


@pytest.mark.parametrize("name", (*PACKAGES, "torch_sdpa"))
def test_streams_younger_than_the_chunk(standins, name):
    """With no frame, with one of two, with both: rows of frames that are not there are zeros and -inf."""
    streams = oracle.Streams(
        required(name), torch.device("cpu"), torch.bfloat16, rf.Rope3D(32, 2, 3), num_layers=1, batch_size=3,
        num_kv_heads=2, frame_tokens=6, sink_frames=1, window_frames=2, alpha=0.5,
    )  # fmt: skip
    streams.begin(1, samples=[1])
    streams.write()
    streams.begin(2, samples=[2])
    streams.poison()
    streams.run_pass(group=2)


@pytest.mark.parametrize("name", PACKAGES[:4])
def test_queries_whose_rows_are_not_aligned(standins, name):
    """Kernels load 16 bytes at a time. Without a rope nothing else would have made them anew."""
    backend, results = required(name), []
    q, k, v = torch.randn(3, 1, 12, 2, 33).to(torch.bfloat16)[..., 1:].unbind(0)
    for used in (backend, "reference"):
        cache = rf.EMASinkCache(
            num_layers=1, batch_size=1, num_kv_heads=2, head_dim=32, frame_tokens=6, sink_frames=1, window_frames=2,
            device="cpu",
        )  # fmt: skip
        cache.begin_chunk(2)
        results.append(rf.streaming_attention(q, k, v, cache[0], backend=used))
    torch.testing.assert_close(*results)


def test_queries_are_rotated_by_the_backend_that_writes(monkeypatch):
    """The CUDA kernels' request for it, answered by the reference. Triton's: triton_backend/test_cache.py."""
    asked = []

    def rotate(request):
        asked.append(request)
        x, frames, first, rope, inverse, dtype = request
        return reference.rotate(x, frames, rope, first_token=first, inverse=inverse, dtype=dtype)

    monkeypatch.setattr("rfkernels.backends.cuda.compiled.rotate", rotate)
    cache = made(5)
    q, frames = torch.randn(2, 12, 4, 32, dtype=torch.float64), cache.num_frames[:, None] + torch.tensor([-2, -1])
    got = library._rotated("cuda", q, cache.num_frames, 2, cache._rope_tables, torch.bfloat16)
    assert torch.equal(got, reference.rotate(q.float(), frames, cache._rope_tables, dtype=torch.bfloat16))
    assert len(asked) == 1 and asked[0].x.dtype == torch.float32


def test_a_recorded_graph_serves_every_age(standins, monkeypatch):
    """While a graph is recorded lengths are on the device also where the host knows them."""
    given = []
    kernel = BY_NAME["flash_attn_3"]
    attend = kernel.attend

    def seen(q, k, v, lengths, scale, return_lse):
        given.append(lengths)
        return attend(q, k, v, lengths, scale, return_lse)

    monkeypatch.setattr(kernel, "attend", seen)
    cache = made()
    q, k, v = tensors(cache)
    request = StreamingAttention(q, cache[0]._write_request(k, v), 0.3, True, False)
    module = backends.module("library:flash_attn_3")
    module.streaming_attention(request)
    with mock.patch.object(library, "_recording", lambda: True):
        module.streaming_attention(request)
    assert given[0] is None and given[1].tolist() == [18, 18]


def test_no_host_read(standins, monkeypatch):
    """On a device, with lengths that it alone knows, and where the host knows that all windows are full."""
    kernel = BY_NAME["flash_attn_3"]
    monkeypatch.setattr(kernel, "attend", lambda q, k, v, lengths, scale, lse: (q.clone(), q[..., 0].mT.float()))
    monkeypatch.setattr(dense, "on_cpu", lambda x: False)
    monkeypatch.setattr(native, "serves", lambda x: False)
    cache = made()
    q, k, v = tensors(cache)
    for full in (False, True):
        request = StreamingAttention(q, cache[0]._write_request(k, v), 0.3, full, True)
        with NoHostRead():
            backends.module("library:flash_attn_3").streaming_attention(request)


@pytest.mark.skipif(
    torch.version.cuda is None or native.torch_version() < FAKE_CUDA_TORCH,
    reason="fake CUDA tensors without a driver need a torch >= {}.{} built with CUDA".format(*FAKE_CUDA_TORCH),
)
def test_torchs_varlen_attention_takes_what_it_is_given(monkeypatch):
    """The real one, with its own check of shapes, on fake tensors; grouped heads and streams of several ages, too."""
    required("torch_varlen")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())  # which asks a driver
    module = backends.module("library:torch_varlen")
    with FakeTensorMode(allow_non_fake_inputs=False):
        cache = rf.EMASinkCache(
            num_layers=2, batch_size=3, num_kv_heads=2, head_dim=64, frame_tokens=6, sink_frames=1, window_frames=2,
            rope=rf.Rope3D(64, 2, 3), device="cuda",
        )  # fmt: skip
        cache.open_frames = 2
        q, k, v = (torch.randn(3, 12, heads, 64, dtype=torch.bfloat16, device="cuda") for heads in (4, 2, 2))
        for full, return_lse in ((False, True), (True, False)):
            request = StreamingAttention(q, cache[1]._write_request(k, v), 0.3, full, return_lse)
            out, lse = module.streaming_attention(request)
            assert out.shape == q.shape and out.is_contiguous() and out.dtype == torch.bfloat16
            assert lse.shape == ((3, 4, 12) if return_lse else (0,)) and lse.is_contiguous()


def made(frames=4, dtype=torch.bfloat16, head_dim=32, **options):
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=2, num_kv_heads=2, head_dim=head_dim, frame_tokens=6, sink_frames=1, window_frames=2,
        rope=rf.Rope3D(head_dim, 2, 3), dtype=dtype, device="cpu", **options,
    )  # fmt: skip
    for _ in range(frames // 2):
        cache.begin_chunk(2)
        _, k, v = tensors(cache)
        cache[0].write(k, v)
    return cache


def tensors(cache, grad=False):
    size = (cache.batch_size, cache.open_frames * cache.frame_tokens, cache.num_kv_heads, cache.head_dim)
    return [torch.randn(size).to(cache.dtype).requires_grad_(grad) for _ in range(3)]


# --- the choice -------------------------------------------------------------------------------------------------------


def chosen(backend, operation="streaming_attention", dtype=torch.bfloat16, head_dim=64):
    return backends.choose(operation, torch.device("cpu"), dtype, head_dim, backend).backend


def test_passes_go_to_the_library_and_all_else_to_our_kernels():
    assert chosen("library") == chosen("library:torch_sdpa") == "library:torch_sdpa"
    for operation in backends.OPERATIONS:
        if operation != "streaming_attention":
            head_dim = None if operation == "redmd_loss" else 64
            assert chosen("library", operation, head_dim=head_dim) == chosen("auto", operation, head_dim=head_dim)
    assert "library" not in {chosen("auto", operation) for operation in backends.OPERATIONS}


def test_a_measurement_can_make_a_kernel_a_row_of_auto(standins, monkeypatch):
    """By its own name; where it does not serve the next row does."""
    rows = (backends.Row("library:flash_attn_3"), *backends._ANY)
    monkeypatch.setitem(backends._AUTO["cpu"], "streaming_attention", rows)
    assert chosen(None) == "library:flash_attn_3" and chosen(None, dtype=torch.float32) == "sdpa"
    streams = oracle.Streams(
        "auto", torch.device("cpu"), torch.bfloat16, None, num_layers=1, batch_size=1, num_kv_heads=1, head_dim=32,
        frame_tokens=4, sink_frames=1, window_frames=2,
    )  # fmt: skip
    streams.begin(2)
    streams.run_pass()
    assert standins[-1:] == ["flash_attn_3"]


def test_gradients_by_our_kernels(standins):
    """A pass that wants them is chunk attention on the frozen past; its write is ours, too."""
    cache, other = made(), made()
    other.load_state_dict(cache.state_dict())
    q, k, v = tensors(cache, grad=True)
    with rf.use_backend("library:flash_attn_2"):
        out = rf.streaming_attention(q, k, v, cache[0])
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    with rf.use_backend("sdpa"):
        expected = rf.streaming_attention(q, k, v, other[0])
    for grad, right in zip(grads, torch.autograd.grad(expected.float().sum(), (q, k, v)), strict=True):
        assert torch.equal(grad, right)
    assert torch.equal(out, expected) and torch.equal(cache.k, other.k) and not standins


@pytest.mark.parametrize(
    "name, dtype, head_dim, message",
    [
        ("flash_attn_2", torch.float32, 64, "FlashAttention-2 serves float16 and bfloat16, got torch.float32"),
        ("flash_attn_3", torch.bfloat16, 36, "a head_dim that is a multiple of 8 up to 256 there, got 36"),
        ("flash_attn_4", torch.bfloat16, 264, "a head_dim that is a multiple of 8 up to 256 there, got 264"),
        ("sage_attention", torch.float16, 136, "a head_dim that is a multiple of 8 up to 128 there, got 136"),
    ],
)
def test_what_a_kernel_does_not_serve(standins, name, dtype, head_dim, message):
    """Said before anything is written."""
    cache = made(dtype=dtype, head_dim=head_dim)
    before = cache.k.clone()
    with pytest.raises(rf.backends.UnservedError, match=rf"'library:{name}' cannot do this: .*{message}"):
        rf.streaming_attention(*tensors(cache), cache[0], backend=f"library:{name}")
    assert torch.equal(cache.k, before)


def test_names(monkeypatch):
    for name in ("flash_attn_3", "flash_attn_4"):
        monkeypatch.setattr(BY_NAME[name], "unavailable", lambda device: "it is not installed (pip install it)")
    with (
        pytest.raises(ValueError, match=r"library:flash_attn_3.* got 'library:flash'"),
        rf.use_backend("library:flash"),
    ):
        pass
    with pytest.raises(ValueError, match="'library:flash_attn_3' is not available: it is not installed"):
        rf.use_backend("library:flash_attn_3").__enter__()
    rows = rf.explain_backends("cpu")
    assert "streaming passes as by library:torch_sdpa" in rows["library"]
    assert rows["library:flash_attn_4"] == "not available: it is not installed (pip install it)"
    assert rows["library:torch_sdpa"].startswith("available: streaming passes by torch's")


def test_reasons_why_a_package_is_not_taken(standins, monkeypatch):
    """Not installed, broken, another device, another GPU."""
    kernel = type(BY_NAME["flash_attn_3"])()
    assert "is for NVIDIA GPUs, not cpu" in kernel.unavailable(torch.device("cpu"))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert torch.cuda.is_available() or kernel.unavailable(device) == "torch sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert "is for compute capability 9.x, not 12.x" in kernel.unavailable(device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert kernel.unavailable(device) is None
    flash_attn_interface = sys.modules["flash_attn_interface"]
    with monkeypatch.context() as patch:
        patch.setattr(flash_attn_interface, "flash_attn_with_kvcache", lambda q, k_cache, v_cache, cache_seqlens: None)
        assert "takes no return_softmax_lse: another version" in type(BY_NAME["flash_attn_3"])().unavailable(device)
    broken = type(BY_NAME["flash_attn_3"])()
    monkeypatch.delattr(flash_attn_interface, "flash_attn_with_kvcache")
    assert "flash_attn_3 is installed, but fails: ImportError" in broken.unavailable(device)
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "flash_attn_interface")
    assert "not installed" in kernel.unavailable(device)


def test_which_flash_attn_is_installed(tmp_path, monkeypatch):
    """2 and 4 share a package: alone, in one folder, in two."""
    found = []
    for number, files in enumerate((["cute/interface.py"], ["__init__.py", "flash_attn_interface.py"])):
        for file in files:
            path = tmp_path / str(number) / "flash_attn" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    for numbers in ((), (0,), (1,), (0, 1), (1, 0)):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "flash_attn", raising=False)
            patch.setattr(sys, "path", [str(tmp_path / str(number)) for number in numbers])
            found.append([BY_NAME[name].not_found() is None for name in ("flash_attn_2", "flash_attn_4")])
    assert found == [[False, False], [False, True], [True, False], [True, True], [True, True]]


@pytest.mark.parametrize(
    "generation, names",
    [
        (8, ("flash_attn_2", "torch_varlen", "torch_sdpa")),
        (9, ("flash_attn_3", "flash_attn_4", "torch_varlen", "torch_sdpa")),
        (10, ("flash_attn_4", "torch_varlen", "torch_sdpa")),
        (12, ("flash_attn_2", "torch_varlen", "flash_attn_4", "torch_sdpa")),
    ],
)
def test_the_order_on_a_gpu(monkeypatch, generation, names):
    """With everything installed the first, and each next one where those before it are not."""
    device, missing = torch.device("cuda", 0), set()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    for kernel in library.KERNELS:
        monkeypatch.setattr(kernel, "not_found", lambda name=kernel.name: "not here" if name in missing else None)
        monkeypatch.setitem(kernel.__dict__, "fault", None)
    for name in names:
        assert library.first(device, torch.bfloat16, 128) == f"library:{name}"
        missing.add(name)
    missing.clear()
    assert (
        library.first(device, torch.float32, 128) == library.first(device, torch.bfloat16, 100) == "library:torch_sdpa"
    )
    if generation == 10:
        assert library.first(device, torch.bfloat16, 256) == "library:torch_varlen"
