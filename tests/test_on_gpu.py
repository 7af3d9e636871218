"""How each backend launches on a GPU: in CUDA graphs, on other streams and devices, from other threads."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import rfkernels as rf

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

DTYPE, HEAD_DIM, FRAMES, SIZE = torch.bfloat16, 64, 2, (4, 6)
TOKENS = SIZE[0] * SIZE[1]
LONG = 200_000_000  # clocks that a stream is kept busy, so that work on the wrong stream overtakes


def make(device: torch.device) -> rf.EMASinkCache:
    return rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=2, head_dim=HEAD_DIM, frame_tokens=TOKENS, sink_frames=1,
        window_frames=4, alpha=0.5, rope=rf.Rope3D(HEAD_DIM, *SIZE), dtype=DTYPE, device=device,
    )  # fmt: skip


def chunks(count: int, device: torch.device) -> list[list[torch.Tensor]]:
    """q, k and v of each chunk, the same ones every time."""
    random = torch.Generator().manual_seed(0)
    sizes = [(1, FRAMES * TOKENS, heads, HEAD_DIM) for heads in (4, 2, 2)]
    return [[torch.randn(size, generator=random).to(device, DTYPE) for size in sizes] for _ in range(count)]


def streamed(given: list[list[torch.Tensor]], device: torch.device) -> list[torch.Tensor]:
    """A stream of these chunks: every output, and what is left in the cache."""
    cache, outs = make(device), []
    for qkv in given:
        cache.begin_chunk(FRAMES)
        outs.append(rf.streaming_attention(*qkv, cache[0]))
    return [*outs, cache.k, cache.v, cache.sink_v]


def differentiated(qkv: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = rf.sink_window_attention(*leaves, sink_tokens=TOKENS, window_tokens=TOKENS, chunk_tokens=TOKENS)
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def check(got: list[torch.Tensor], expected: list[torch.Tensor], backend: str) -> None:
    """Equal bits of our kernels; torch's own, in the other backends, may add in another order."""
    tolerance = 0.0 if backend in ("triton", "cuda") else 2e-2
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=tolerance, atol=tolerance)


def test_a_cuda_graph_holds_a_pass(device, backend):
    """Captured once, replayed for later chunks with other inputs. Kernels are compiled by the calls before it."""
    given = chunks(7, device)
    expected = streamed(given, device)
    cache, static = make(device), [x.clone() for x in given[0]]
    outs = []
    for number, qkv in enumerate(given):
        for x, fresh in zip(static, qkv, strict=True):
            x.copy_(fresh)
        cache.begin_chunk(FRAMES)
        if number == 4:  # full: from here on every pass is the same
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = rf.streaming_attention(*static, cache[0])
        if number >= 4:
            graph.replay()
            outs.append(out.clone())
        else:
            outs.append(rf.streaming_attention(*static, cache[0]))
    check([*outs, cache.k, cache.v, cache.sink_v], expected, backend)


def test_launches_are_on_the_current_stream(device, backend):
    """The inputs are made on a busy side stream: a kernel on another one would read what was there before."""
    given = chunks(6, device)
    expected = [*streamed(given, device), *differentiated(given[0])]
    late = [[torch.zeros_like(x) for x in qkv] for qkv in given]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(LONG)
        for qkv, known in zip(late, given, strict=True):
            for x, fresh in zip(qkv, known, strict=True):
                x.copy_(fresh)
        got = [*streamed(late, device), *differentiated(late[0])]
    side.synchronize()
    check(got, expected, backend)


def test_another_thread_launches(device, backend):
    """With a stream of its own, as autograd's threads and data loaders have; gradients too."""
    (qkv,) = chunks(1, device)
    expected = [*streamed([qkv], device), *differentiated(qkv)]

    def work() -> list[torch.Tensor]:
        assert threading.current_thread() is not threading.main_thread()
        with torch.cuda.stream(torch.cuda.Stream()), rf.use_backend(backend):
            got = [*streamed([qkv], device), *differentiated(qkv)]
            torch.cuda.current_stream().synchronize()
        return got

    torch.cuda.synchronize()
    with ThreadPoolExecutor(1) as pool:
        check(pool.submit(work).result(), expected, backend)


def test_a_first_launch_within_backward(device, backend):
    """A dtype that nothing before it has used: its backward kernels are compiled and loaded by autograd's thread."""
    qkv = [x.to(torch.float16) for x in chunks(1, device)[0]]
    with rf.use_backend("reference"):
        expected = differentiated(qkv)
    for ours, exact in zip(differentiated(qkv), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=2e-2, atol=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_tensors_device_counts_not_the_current_one(device, backend):
    given = chunks(6, torch.device("cuda:0"))
    expected = [*streamed(given, torch.device("cuda:0")), *differentiated(given[0])]
    second = torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    moved = [[x.to(second) for x in qkv] for qkv in given]
    got = [*streamed(moved, second), *differentiated(moved[0])]
    assert all(x.device == second for x in got) and torch.cuda.current_device() == 0
    check(got, expected, backend)
