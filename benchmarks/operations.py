"""The operations: for a case, everything that does it, on the same inputs, and what the result must be.

Every contender has state of its own with the same history, so that its first call gives the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch

import rfkernels as rf
from rfkernels import backends, reference
from rfkernels.geometry import WindowMask
from rfkernels.losses import redmd_loss

from . import competitors, usual
from .cases import Case, Latent, Sequence, Stream, Work
from .gate import Results

FLOOR = competitors.FLOOR
OURS = "rfkernels "  # and the backend's name


@dataclass
class Contender:
    """call: what is timed. read: the tensors to compare, from what it returned. around: entered outside the timing."""

    call: Callable[[], object]
    read: Callable[[object], Results]
    around: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext


@dataclass
class Bench:
    """One operation on one case. skipped: why contenders are missing."""

    work: Work
    contenders: dict[str, Contender]
    exact: Results  # float64
    plain: Results  # plain PyTorch in the case's dtype
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    device: torch.device
    compiled: bool = True  # competitors that compile for many seconds take part
    seed: int = 0


def _out(result) -> Results:
    return {"out": result}


def _backends(options: Options, dtype: torch.dtype, head_dim: int | None, skipped: dict[str, str]) -> Iterator[str]:
    for name, why in rf.explain_backends(options.device).items():
        if name == "auto":
            continue
        refusal = backends._TABLE[name].refuses(dtype, head_dim)
        if name not in rf.available_backends(options.device):
            skipped[OURS + name] = why.removeprefix("not available: ")
        elif refusal is not None:
            skipped[OURS + name] = refusal
        else:
            yield name


def _ours(options, dtype, head_dim, skipped, make: Callable[[], tuple[Callable, Callable]]) -> dict[str, Contender]:
    """A contender for each backend, with whatever ``make`` sets up for it."""
    found = {}
    for name in _backends(options, dtype, head_dim, skipped):
        around = partial(rf.use_backend, name)
        with around():
            call, read = make()
        found[OURS + name] = Contender(call, read, around)
    return found


def _competitors(options, q, k, v, visible, skipped, repeat: int = 1) -> dict[str, Contender]:
    found = {}
    for row in competitors.TABLE:
        why_not = row.why_not(options.device, q.dtype, visible is not None)
        if why_not is None and row.compiles and not options.compiled:
            why_not = "compiles for many seconds: in few rows, or where -k asks for it"
        if why_not is not None:
            skipped[row.name] = why_not
            continue
        call = row.make(q, k, v, visible)
        found[row.name] = Contender(call if repeat == 1 else partial(_repeat, call, repeat), _out)
    return found


def _repeat(call, count):
    for _ in range(count):
        out = call()
    return out


# --- streaming --------------------------------------------------------------------------------------------------------


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


def exact_attention(q, k, v, visible=None) -> torch.Tensor:
    """In float64, head by head, so that the scores of one head are all that is held."""
    group = q.shape[2] // k.shape[2]
    heads = [
        competitors._sdpa(q[:, :, h : h + 1], k[:, :, h // group, None], v[:, :, h // group, None], visible)()
        for h in range(q.shape[2])
    ]
    return torch.cat(heads, 2)


def begin_chunk(case: Stream, options: Options) -> Bench:
    """Evict, fuse and re-rotate, all layers."""
    s, skipped = Streaming(case, options, case.layers), {}

    def read(cache) -> Results:
        return {"sink_k": cache.sink_k[0], "sink_v": cache.sink_v[0]}

    def ours():
        cache = s.cache()
        return partial(cache.begin_chunk, case.frames), lambda _: read(cache)

    contenders = _ours(options, case.dtype, case.head_dim, skipped, ours)
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
        slots = [cache.geometry.slot(first + i) for i in range(case.frames)]
        return {
            name: x.unflatten(1, (-1, case.frame_tokens))[:, slots].flatten(1, 2)
            for name, x in (("k", cache[0].k), ("v", cache[0].v))
        }

    def ours():
        cache = s.cache()
        cache.begin_chunk(case.frames)
        return partial(cache[0].write, k, v), lambda _: written(cache)

    contenders = _ours(options, case.dtype, case.head_dim, skipped, ours)
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
        return partial(rf.streaming_attention, q, k, v, cache[0]), _out

    contenders = _ours(options, case.dtype, case.head_dim, skipped, ours)
    (old,) = s.usual()
    contenders["usual"] = Contender(partial(old.attend, q, k, v, s.start), _out)
    ready = s.exact()
    half = [x.to(case.dtype) for x in ready]
    contenders |= _competitors(options, *half, None, skipped)
    exact, plain = exact_attention(*ready), contenders[FLOOR].call()
    return Bench(case.attention(), contenders, _out(exact), _out(plain), skipped)


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

        return call, _out

    contenders = _ours(options, case.dtype, case.head_dim, skipped, ours)
    old, clock = s.usual(), _counter(case, s.start)

    def usual_call():
        start = clock() if opens else s.start
        for _ in range(passes):
            for cache, (q, k, v) in zip(old, s.inputs, strict=True):
                out = cache.attend(q, k, v, start)
        return out

    contenders["usual"] = Contender(usual_call, _out)
    ready = s.exact(case.layers - 1)
    half = [x.to(case.dtype) for x in ready]
    peers = _competitors(options, *half, None, skipped, repeat=passes * case.layers)
    exact, plain = exact_attention(*ready), competitors._sdpa(*half, None)()
    return Bench(work, contenders | peers, _out(exact), _out(plain), skipped)


# --- training ---------------------------------------------------------------------------------------------------------


def _forward_backward(function, inputs, grad_out):
    """out and the gradients of the inputs, as a call and its reader."""

    def call():
        with torch.enable_grad():
            out = function(*inputs)
            return out.detach(), *torch.autograd.grad(out, inputs, grad_out)

    def read(result) -> Results:
        return dict(zip(("out", "grad_q", "grad_k", "grad_v"), result, strict=False))

    return call, read


def chunk_attention(case: Stream, options: Options, train: bool = False) -> Bench:
    """The open chunk as a pure function of its frozen past; with train, forward and backward."""
    s, skipped = Streaming(case, options, 1), {}
    inputs = [x.requires_grad_(train) for x in s.inputs[0]]
    grad_out = torch.randn(inputs[0].shape, generator=s.random, device=options.device).to(case.dtype)

    def contender(function) -> tuple[Callable, Callable]:
        return _forward_backward(function, inputs, grad_out) if train else (partial(function, *inputs), _out)

    def ours():
        cache = s.cache()
        cache.begin_chunk(case.frames)
        context = cache[0].context()
        return contender(lambda q, k, v: rf.chunk_attention(q, k, v, context))

    contenders = _ours(options, case.dtype, case.head_dim, skipped, ours)

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
        call, read = _forward_backward(usual.sdpa, half, grad_out)
        contenders[FLOOR] = Contender(call, lambda result: {"out": read(result)["out"]})
        wide = [x.detach().double().requires_grad_() for x in inputs]
        call, read = _forward_backward(joined(torch.float64), wide, grad_out.double())
        exact, plain = read(call()), contenders["usual"].read(contenders["usual"].call())
    else:
        contenders |= _competitors(options, *half, None, skipped)
        exact, plain = _out(exact_attention(*ready)), _out(contenders[FLOOR].call())
    work = case.chunk_attention_training() if train else case.chunk_attention()
    return Bench(work, contenders, exact, plain, skipped)


def sequence_attention(case: Sequence, options: Options, train: bool = False) -> Bench:
    """sink_window_attention of a whole sequence; with train, forward and backward."""
    random, skipped = torch.Generator(options.device).manual_seed(options.seed), {}
    sizes = [(1, case.tokens, heads, case.head_dim) for heads in (case.heads, case.kv_heads, case.kv_heads)]
    q, k, v, grad_out = (
        torch.randn(size, generator=random, device=options.device).to(case.dtype) for size in (*sizes, sizes[0])
    )
    inputs = [x.requires_grad_(train) for x in (q, k, v)]
    rope = None if case.rope is None else rf.Rope3D(case.head_dim, *case.rope)
    mask = WindowMask(case.sink, case.window, case.chunk, case.chunk)

    def contender(function, inputs=inputs, grad_out=grad_out):
        return _forward_backward(function, inputs, grad_out) if train else (partial(function, *inputs), _out)

    def attend(q, k, v):
        return rf.sink_window_attention(
            q, k, v, sink_tokens=case.sink, window_tokens=case.window, chunk_tokens=case.chunk, rope=rope
        )

    contenders = _ours(options, case.dtype, case.head_dim, skipped, lambda: contender(attend))

    def masked(q, k, v):
        return competitors._sdpa(q, k, v, mask.visible)()

    wide = [x.detach().double().requires_grad_(train) for x in inputs]
    if rope is None:
        if train:
            contenders["SDPA, mask"] = Contender(*contender(masked))
        else:
            contenders |= _competitors(options, *inputs, mask.visible, skipped)
        call, read = contender(masked, wide, grad_out.double())
        exact = read(call())
        call, read = contender(masked)
        plain = read(call())
    else:
        # Sinks stand before each chunk's window, which one mask cannot say: the definition in float64 decides.
        with rf.use_backend("reference"):
            call, read = contender(attend, wide, grad_out.double())
            exact = read(call())
            call, read = contender(attend)
            plain = read(call())
    return Bench(case.training() if train else case.forward(), contenders, exact, plain, skipped)


def redmd(case: Latent, options: Options) -> Bench:
    """The Re-DMD loss and its gradient."""
    random, skipped = torch.Generator(options.device).manual_seed(options.seed), {}
    x, fake, cond, uncond = (
        torch.randn(case.shape, generator=random, device=options.device).to(case.dtype) for _ in range(4)
    )
    mask = None
    if case.masked:
        mask = torch.rand(case.shape, generator=random, device=options.device) > 0.3
    weight, guidance = torch.tensor([1.7], device=options.device), 3.0

    def differentiate(loss, latents):
        x, *rest = latents
        x.requires_grad_()

        def call():
            with torch.enable_grad():
                value = loss(x, *rest)
                return value.detach(), *torch.autograd.grad(value, x)

        return call, lambda result: {"loss": result[0], "grad": result[1]}

    latents = (x, fake, cond, uncond)

    def ours(x, fake, cond, uncond):
        return redmd_loss(x, fake, cond, uncond, weight, guidance_scale=guidance, mask=mask)

    contenders = _ours(options, case.dtype, None, skipped, lambda: differentiate(ours, latents))
    for name, function in (("published", usual.published_loss), ("plain", usual.plain_loss)):
        loss = partial(function, weight=weight[0], guidance=guidance, mask=mask)
        contenders[name] = Contender(*differentiate(loss, latents))
    wide = tuple(latent.detach().double() for latent in latents)
    call, read = differentiate(
        partial(usual.published_loss, weight=weight[0].double(), guidance=guidance, mask=mask), wide
    )
    exact = read(call())
    plain = contenders["plain"].read(contenders["plain"].call())
    return Bench(case.redmd(), contenders, exact, plain, skipped)


Build = Callable[[Case, Options], Bench]

OPERATIONS: dict[str, tuple[type, Build]] = {
    "begin_chunk": (Stream, begin_chunk),
    "write": (Stream, write),
    "attention": (Stream, attention),
    "pass": (Stream, streaming_pass),
    "chunk": (Stream, chunk),
    "chunk_attention": (Stream, chunk_attention),
    "chunk_attention_training": (Stream, partial(chunk_attention, train=True)),
    "sequence": (Sequence, sequence_attention),
    "sequence_training": (Sequence, partial(sequence_attention, train=True)),
    "redmd": (Latent, redmd),
}
