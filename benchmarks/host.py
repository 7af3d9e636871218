"""What a pass costs the host, without a GPU: ``python -m benchmarks.host``.

All layers of the 1.3B sizes at a few tokens, launches noted instead of made: Triton's, or the compiled CUDA operator.
Processor time of the thread, so that a busy machine counts less; rounds in which each way runs once, and ratios of
these. *by the operator* goes through torch's dispatcher, as tracers and profilers see a pass; *directly* is how it
runs otherwise.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import rfkernels as rf
from rfkernels import backends, ops
from rfkernels.backends.cuda import compiled

BACKENDS = ("triton", "cuda")
WAYS = ("by the operator", "directly")
_LAYERS, _HEADS, _HEAD_DIM, _FRAMES, _SIZE = 30, 12, 128, 3, (2, 2)


@contextlib.contextmanager
def noted(backend: str) -> Iterator[Counter]:
    """What would have been launched, by name, while ``backend`` takes CPU tensors for a device's."""
    launches: Counter = Counter()
    with contextlib.ExitStack() as stack:
        for name in ("unavailable", "unsupported"):
            stack.enter_context(mock.patch.object(backends.module(backend), name, lambda *_: None))
        stack.enter_context(mock.patch.object(backends, "_choices", {}))
        if backend == "triton":
            from triton.runtime import driver
            from triton.runtime.jit import JITFunction

            from rfkernels.backends.triton import tiles

            def note(self, *args, **kwargs):
                launches[self.fn.__name__] += 1

            stack.enter_context(mock.patch.object(JITFunction, "run", note))
            stack.enter_context(mock.patch.multiple(tiles, architecture=lambda: 90, processors=lambda device: 132))
            stack.enter_context(mock.patch.object(driver, "_active", mock.Mock()))
        else:

            class Native:
                @staticmethod
                def streaming_attention(q, *rest):
                    launches["streaming_attention"] += 1
                    return torch.empty_like(q), q.new_empty(0)

            stack.enter_context(mock.patch.object(compiled, "native", Native))
        yield launches


def a_pass(backend: str) -> Callable[[], None]:
    """All layers, on a full ring."""
    cache = rf.EMASinkCache(
        num_layers=_LAYERS, batch_size=1, num_kv_heads=_HEADS, head_dim=_HEAD_DIM, frame_tokens=_SIZE[0] * _SIZE[1],
        sink_frames=3, window_frames=6, rope=rf.Rope3D(_HEAD_DIM, *_SIZE), device="cpu",
    )  # fmt: skip
    while not cache.full:
        cache.begin_chunk(_FRAMES, backend="reference")
        cache[0].write(*torch.zeros(2, 1, cache.open_frames * cache.frame_tokens, _HEADS, _HEAD_DIM))
    layers = list(cache)
    q, k, v = torch.zeros(3, 1, _FRAMES * cache.frame_tokens, _HEADS, _HEAD_DIM, dtype=cache.dtype)

    def call():
        for layer in layers:
            rf.streaming_attention(q, k, v, layer, backend=backend)

    return call


def measure(backend: str, rounds: int = 100) -> dict[str, list[float]]:
    """Seconds of a layer, for each way and round."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    dispatched = mock.patch.object(ops, "unobserved", lambda *tensors: False)
    with noted(backend), torch.no_grad():
        call = a_pass(backend)
        for index in range(rounds + 3):
            for way in WAYS:
                with dispatched if way == WAYS[0] else contextlib.nullcontext():
                    start = time.thread_time()
                    call()
                    spent = time.thread_time() - start
                if index >= 3:
                    found[way].append(spent / _LAYERS)
    return found


def main() -> None:
    torch.set_num_threads(1)
    for backend in BACKENDS:
        found = measure(backend)
        ratio = statistics.median(b / a for a, b in zip(*(found[way] for way in WAYS), strict=True))
        times = ", ".join(f"{way} {min(seconds) * 1e6:.1f} us" for way, seconds in found.items())
        print(f"{backend}: a layer {times} (least of {len(found[WAYS[0]])} rounds); ratio {ratio:.2f} (median)")


if __name__ == "__main__":
    main()
