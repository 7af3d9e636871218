"""Operations on a streaming cache, and on the frozen past of a chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

import rfkernels as rf
from rfkernels.backends import reference

from . import competitors, usual
from .cases import Stream, Work
from .contenders import (
    FLOOR,
    Bench,
    Contender,
    Options,
    exact_attention,
    forward_backward,
    ours_of,
    out_only,
    peers_of,
)  # fmt: skip
from .gate import Results


class Streaming:
    """Inputs of a case and caches of every kind, filled by the same chunks until frames have been evicted twice."""

    def __init__(self, case: Stream, options: Options, layers: int):
        self.case, self.options, self.layers = case, options, layers
        self.rope = rf.Rope3D(case.head_dim, case.rows, case.columns)
        self.random = torch.Generator(options.device).manual_seed(options.seed)
        chunks = -(-(case.sink + case.window) // case.frames) + 2
        self.history = [self.chunk()[1:] for _ in range(chunks)]
        self.inputs = [self.chunk() for _ in range(layers)]
        self.start = chunks * case.queries  # of the chunk that the inputs are
        self._state: dict | None = None

    def chunk(self) -> list[torch.Tensor]:
        c = self.case
        sizes = ((1, c.queries, heads, c.head_dim) for heads in (c.heads, c.kv_heads, c.kv_heads))
        return [torch.randn(s, generator=self.random, device=self.options.device).to(c.dtype) for s in sizes]

    def cache(self) -> rf.EMASinkCache:
        c = self.case
        cache = rf.EMASinkCache(
            num_layers=self.layers, batch_size=1, num_kv_heads=c.kv_heads, head_dim=c.head_dim,
            frame_tokens=c.frame_tokens, sink_frames=c.sink, window_frames=c.window, alpha=c.alpha, rope=self.rope,
            dtype=c.dtype, device=self.options.device,
        )  # fmt: skip
        if self._state is None:  # filled once, by the default backend
            with rf.use_backend("auto"):
                for k, v in self.history:
                    cache.begin_chunk(c.frames)
                    for layer in cache:
                        layer.write(k, v)
            self._state = cache.snapshot()
        else:
            cache.restore(self._state)
        return cache

    def usual(self, dtype: torch.dtype | None = None, layers: int | None = None) -> list[usual.UsualCache]:
        c = self.case
        phases = usual.phases(self.rope, c.sink + c.window, self.options.device)
        caches = []
        for _ in range(layers or self.layers):
            cache = usual.UsualCache(
                c.kv_heads, c.head_dim, c.frame_tokens, c.sink, c.window, phases, c.alpha, dtype or c.dtype,
                self.options.device,
            )  # fmt: skip
            for i, (k, v) in enumerate(self.history):
                cache.open(c.queries, i * c.queries)
                cache.k[:, cache.filled - c.queries : cache.filled] = k
                cache.v[:, cache.filled - c.queries : cache.filled] = v
            caches.append(cache)
        return caches

    def exact(self, layer: int = 0) -> tuple[torch.Tensor, ...]:
        """Rotated queries, keys and values of the open chunk in float64, by the usual procedure."""
        q, k, v = (x.double() for x in self.inputs[layer])
        return self.usual(torch.float64, 1)[0].visible(q, k, v, self.start)


def begin_chunk(case: Stream, options: Options) -> Bench:
    """Evict, fuse and re-rotate, all layers."""
    s, skipped = Streaming(case, options, case.layers), {}

    def read(cache) -> Results:
        return {"sink_k": cache.sink_k[0], "sink_v": cache.sink_v[0]}

    def ours():
        cache = s.cache()
        return partial(cache.begin_chunk, case.frames), lambda _: read(cache)

    contenders = ours_of(options, case.dtype, case.head_dim, skipped, ours)
    old, clock = s.usual(), _counter(case, s.start)

    def usual_open():
        start = clock()
        for cache in old:
            cache.open(case.queries, start)

    def sinks(cache) -> Results:
        return {"sink_k": cache.k[:, : cache.sink], "sink_v": cache.v[:, : cache.sink]}

    contenders["usual"] = Contender(usual_open, lambda _: sinks(old[0]))
    exact, plain = s.usual(torch.float64, 1)[0], s.cache()
    exact.open(case.queries, s.start)
    with rf.use_backend("reference"):
        plain.begin_chunk(case.frames)
    return Bench(case.begin_chunk(), contenders, sinks(exact), read(plain), skipped)


def _counter(case: Stream, start: int) -> Callable[[], int]:
    """The first token of one chunk after another."""
    starts = iter(range(start, 1 << 62, case.queries))
    return lambda: next(starts)


def write(case: Stream, options: Options) -> Bench:
    """K and V of one layer into the cache, K rotated; the floor is a copy of both."""
    s, skipped = Streaming(case, options, 1), {}
    _, k, v = s.inputs[0]
    first = len(s.history) * case.frames

    def written(cache) -> Results:
        slots = [cache._geometry.slot(first + i) for i in range(case.frames)]
        return {
            name: x.unflatten(1, (-1, case.frame_tokens))[:, slots].flatten(1, 2)
            for name, x in (("k", cache[0].k), ("v", cache[0].v))
        }

    def ours():
        cache = s.cache()
        cache.begin_chunk(case.frames)
        return partial(cache[0].write, k, v), lambda _: written(cache)

    contenders = ours_of(options, case.dtype, case.head_dim, skipped, ours)
    copies = torch.empty_like(k), torch.empty_like(v)

    def copy():
        copies[0].copy_(k)
        copies[1].copy_(v)

    contenders["copy"] = Contender(copy, lambda _: {"v": copies[1]})
    frames = torch.arange(first, first + case.frames, device=options.device)[None]
    rotated = {
        dtype: reference.rotate(k.to(dtype), frames, s.rope.tables(options.device, dtype), dtype=dtype)
        for dtype in (torch.float64, case.dtype)
    }
    exact, plain = {"k": rotated[torch.float64], "v": v.double()}, {"k": rotated[case.dtype], "v": v}
    return Bench(case.write(), contenders, exact, plain, skipped)


def attention(case: Stream, options: Options) -> Bench:
    """A later pass of one layer; what it is compared with has its keys and values ready."""
    s, skipped = Streaming(case, options, 1), {}
    q, k, v = s.inputs[0]

    def ours():
        cache = s.cache()
        cache.begin_chunk(case.frames)
        return partial(rf.streaming_attention, q, k, v, cache[0]), out_only

    contenders = ours_of(options, case.dtype, case.head_dim, skipped, ours, passes=True)
    (old,) = s.usual()
    contenders["usual"] = Contender(partial(old.attend, q, k, v, s.start), out_only)
    ready = s.exact()
    half = [x.to(case.dtype) for x in ready]
    contenders |= peers_of(options, *half, None, skipped)
    exact, plain = exact_attention(*ready), contenders[FLOOR].call()
    return Bench(case.attention(), contenders, out_only(exact), out_only(plain), skipped)


def streaming_pass(case: Stream, options: Options) -> Bench:
    """A later pass of all layers, one after another."""
    return _layers(case, options, case.streaming_pass(), passes=1, opens=False)


def chunk(case: Stream, options: Options) -> Bench:
    """A whole chunk: begin_chunk and every pass over all layers."""
    return _layers(case, options, case.chunk(), passes=case.passes, opens=True)


def _layers(case: Stream, options: Options, work: Work, passes: int, opens: bool) -> Bench:
    s, skipped = Streaming(case, options, case.layers), {}

    def ours():
        cache = s.cache()
        if not opens:
            cache.begin_chunk(case.frames)

        def call():
            if opens:
                cache.begin_chunk(case.frames)
            for _ in range(passes):
                for layer, (q, k, v) in zip(cache, s.inputs, strict=True):
                    out = rf.streaming_attention(q, k, v, layer)
            return out

        return call, out_only

    contenders = ours_of(options, case.dtype, case.head_dim, skipped, ours, passes=True)
    old, clock = s.usual(), _counter(case, s.start)

    def usual_call():
        start = clock() if opens else s.start
        for _ in range(passes):
            for cache, (q, k, v) in zip(old, s.inputs, strict=True):
                out = cache.attend(q, k, v, start)
        return out

    contenders["usual"] = Contender(usual_call, out_only)
    ready = s.exact(case.layers - 1)
    half = [x.to(case.dtype) for x in ready]
    peers = peers_of(options, *half, None, skipped, repeat=passes * case.layers)
    exact, plain = exact_attention(*ready), competitors.ready_sdpa(*half, None)()
    return Bench(work, contenders | peers, out_only(exact), out_only(plain), skipped)


# --- training ---------------------------------------------------------------------------------------------------------


def chunk_attention(case: Stream, options: Options, train: bool = False) -> Bench:
    """The open chunk as a pure function of its frozen past; with train, forward and backward."""
    s, skipped = Streaming(case, options, 1), {}
    inputs = [x.requires_grad_(train) for x in s.inputs[0]]
    grad_out = torch.randn(inputs[0].shape, generator=s.random, device=options.device).to(case.dtype)

    def contender(function) -> tuple[Callable, Callable]:
        return forward_backward(function, inputs, grad_out) if train else (partial(function, *inputs), out_only)

    def ours():
        cache = s.cache()
        cache.begin_chunk(case.frames)
        context = cache[0].context()
        return contender(lambda q, k, v: rf.chunk_attention(q, k, v, context))

    contenders = ours_of(options, case.dtype, case.head_dim, skipped, ours)

    def joined(dtype):
        (cache,) = s.usual(dtype, 1)
        cache.open(case.queries, s.start)
        begin = int(cache.filled) - case.queries
        past_k, past_v = cache.k[:, :begin], cache.v[:, :begin]
        phases = usual.phases(s.rope, case.sink + case.window, options.device)
        return lambda q, k, v: usual.chunk_attention(q, k, v, past_k, past_v, phases)

    contenders["usual"] = Contender(*contender(joined(case.dtype)))
    ready = [x.detach() for x in s.exact()]
    half = [x.to(case.dtype).requires_grad_(train) for x in ready]
    if train:
        # Its gradients are those of rotated tensors, and of the past too: the result to compare is out.
        call, read = forward_backward(usual.sdpa, half, grad_out)
        contenders[FLOOR] = Contender(call, lambda result: {"out": read(result)["out"]})
        wide = [x.detach().double().requires_grad_() for x in inputs]
        call, read = forward_backward(joined(torch.float64), wide, grad_out.double())
        exact, plain = read(call()), contenders["usual"].read(contenders["usual"].call())
    else:
        contenders |= peers_of(options, *half, None, skipped)
        exact, plain = out_only(exact_attention(*ready)), out_only(contenders[FLOOR].call())
    work = case.chunk_attention_training() if train else case.chunk_attention()
    return Bench(work, contenders, exact, plain, skipped)
