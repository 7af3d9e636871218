"""What the backend and its host code do beside launching: they wait for nothing and allocate results only."""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import nullcontext

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import rfkernels as rf
from rfkernels.backends import cuda
from rfkernels.contract.requests import ReDMD

BF16, FRAME = torch.bfloat16, 6  # tokens of a frame
SAMPLES, HEADS, HEAD_DIM = 2, 4, 64
ROPE = rf.Rope3D(HEAD_DIM, 2, 3)


def make(device) -> rf.EMASinkCache:
    return rf.EMASinkCache(
        num_layers=1, batch_size=SAMPLES, num_kv_heads=2, head_dim=HEAD_DIM, frame_tokens=FRAME, sink_frames=1,
        window_frames=4, alpha=0.5, rope=ROPE, dtype=BF16, device=device,
    )  # fmt: skip


def inputs(device, frames: int, grad: bool = False) -> list[torch.Tensor]:
    return [
        torch.randn(SAMPLES, frames * FRAME, heads, HEAD_DIM, device=device).to(BF16).requires_grad_(grad)
        for heads in (HEADS, 2, 2)
    ]


def streaming(device):
    cache, new = make(device), inputs(device, 2)

    def run():
        cache.begin_chunk(2)
        cache[0].write(*new[1:])
        rf.streaming_attention(*new, cache[0])

    return run


def chunk(device):
    cache, leaves = make(device), inputs(device, 2, grad=True)
    cache.begin_chunk(2)
    cache[0].write(*leaves[1:])
    cache.begin_chunk(2)
    context = cache[0].context()
    return lambda: rf.chunk_attention(*leaves, context, return_lse=True)[0].sum().backward()


def window(device):
    leaves = inputs(device, 8, grad=True)
    masks = dict(sink_tokens=FRAME, window_tokens=2 * FRAME, chunk_tokens=FRAME)
    return lambda: rf.sink_window_attention(*leaves, rope=ROPE, **masks).sum().backward()


def loss(device):
    """Below the op: above it a reward on the CPU is looked at."""
    x, fake, real, real_uncond = (torch.randn(SAMPLES, 3, 50, device=device) for _ in range(4))
    weight, mask = torch.ones(SAMPLES, device=device), x > 0
    request = ReDMD(x, fake, real, real_uncond, None, weight, mask, 3.0, 0.0, True)
    return lambda: cuda.redmd_loss(request)


OPERATIONS = {function.__name__: function for function in (streaming, chunk, window, loss)}

# Each of them makes the host wait, or reads what only the device knows.
WAITING = {"aten::item", "aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}


def events(emulated, run, processors: int = 8) -> list:
    """What the profiler records, which sees also those torch operations that C++ calls."""
    only_listed = nullcontext() if emulated is None else emulated.planning(processors, 164 << 10)
    with only_listed, rf.use_backend("cuda"):
        for _ in range(3):  # tables of a rope are made at first use; then the cache is full
            run()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
            run()
    return list(recorded.events())


@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_waits_for_the_device(device, emulated, name):
    seen = {event.name for event in events(emulated, OPERATIONS[name](device))}
    assert not seen & WAITING
    assert emulated is None or "rfkernels_emulated::launch" in seen


def test_a_planted_wait_is_seen(device, emulated):
    run, number = streaming(device), torch.ones(1, device=device)
    assert {event.name for event in events(emulated, lambda: (run(), number.item()))} & WAITING


def allocations(recorded: list, operator: str) -> list[list[tuple]]:
    """For each call of a compiled operator the shapes that it allocates; it may call nothing else but `launch`."""
    calls = []
    for call in recorded:
        if call.name != f"rfkernels_emulated::{operator}":
            continue
        shapes = []
        for event in call.cpu_children:
            assert event.name in ("rfkernels_emulated::launch", "aten::new_empty", "aten::empty_like"), event.name
            if event.name == "aten::empty_like":
                shapes.append(tuple(event.input_shapes[0]))
            elif event.name == "aten::new_empty" and event.concrete_inputs[2] != BYTES:
                shapes.append(tuple(event.concrete_inputs[1]))
        calls.append(shapes)
    return calls


BYTES = 0  # the dtype's number: the emulated runtime hands the kernel's parameter on in a tensor
Q, KV, ROWS = (SAMPLES, 2 * FRAME, HEADS, HEAD_DIM), (SAMPLES, 2 * FRAME, 2, HEAD_DIM), (SAMPLES, HEADS, 2 * FRAME)
ALLOCATED = {  # by each call: results, and what docs/dev/cuda.md names beside them
    "streaming": {"begin_chunk": [[]], "write": [[]], "streaming_attention": [[Q, ROWS]]},
    "chunk": {"rotate": [[KV], [Q]], "attention_forward": [[Q, ROWS]], "attention_backward": [[Q, KV, KV, (*ROWS, 2)]]},
    "loss": {"redmd_loss": [[(SAMPLES, 3, 50), (), (SAMPLES, 1), (SAMPLES, 1), (SAMPLES, 1)]]},
}


@pytest.mark.parametrize("name", ALLOCATED)
def test_only_results_are_allocated(device, emulated, name):
    if emulated is None:
        pytest.skip("seen through the emulated runtime")
    recorded = events(emulated, OPERATIONS[name](device))
    for operator, allowed in ALLOCATED[name].items():
        calls = allocations(recorded, operator)
        assert calls and all(call in allowed for call in calls), calls


def test_a_tail_allocates_a_tile_for_each_share(device, emulated):
    if emulated is None:
        pytest.skip("seen through the emulated runtime")
    q = torch.empty(1, 100, 1, HEAD_DIM, dtype=BF16)
    k = torch.empty(1, 600, 1, HEAD_DIM, dtype=BF16)
    window = dict(sink_tokens=0, window_tokens=600, chunk_tokens=600)
    recorded = events(emulated, lambda: rf.sink_window_attention(q, k, k, **window), processors=108)
    assert allocations(recorded, "attention_forward") == [[(1, 100, 1, 64), (1, 1, 100), (1, 4, 128), (1, 4, 128, 64)]]


def test_only_runtime_h_leads_to_cuda(emulated):
    """The host code, compiled with another runtime, asks for nothing of CUDA: all it can do is in runtime.h."""
    if emulated is None or shutil.which("nm") is None:
        pytest.skip("needs the emulated runtime, and nm (binutils)")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", emulated._library()], capture_output=True, text=True)
    names = [line.split()[-1] for line in symbols.stdout.splitlines()]
    assert any(name.startswith("torch_call_dispatcher") for name in names)
    assert not [name for name in names if re.match(r"(cuda|cu[A-Z]|__cuda)", name)]
