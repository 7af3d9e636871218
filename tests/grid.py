"""The cases that every backend's kernels run, as data, and the functions that run one.

A case says nothing of where it runs: Triton's interpreter, a GPU, or PTX on the emulator. Tiles of a compiled kernel
are larger than the interpreter's, so there ``case._replace(head_dim=..., size=...)`` makes it straddle them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

import budget
import oracle
import torch

import rfkernels as rf


def pairwise(options: dict[str, tuple], excluded: Callable[[dict], bool] = lambda row: False) -> list[dict]:
    """Few rows in which every two values of two options meet, unless ``excluded``; the same rows every time."""
    draw = random.Random(0)

    def pairs(row: dict) -> set:
        return set(itertools.combinations(row.items(), 2))

    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(options, 2)
        for x, y in itertools.product(options[a], options[b])
        if not excluded({a: x, b: y})
    }
    rows = []
    while missing:
        fixed = dict(min(missing, key=str))  # a pair that is still missing: every row is of use
        drawn = [{name: fixed.get(name, draw.choice(values)) for name, values in options.items()} for _ in range(150)]
        rows.append(max((row for row in drawn if not excluded(row)), key=lambda row: len(pairs(row) & missing)))
        missing -= pairs(rows[-1])
    return rows


def rope_of(head_dim: int, pairing: str | None, size: tuple[int, int] | None) -> rf.Rope3D | None:
    """pairing None: no rope. size None: one axis, every pair turns with the frame."""
    return None if pairing is None else rf.Rope3D(head_dim, *(size or ()), pairing=pairing)


# --- a stream: begin_chunk, write, streaming attention ----------------------------------------------------------------


class Life(NamedTuple):
    """A stream from its first frame until its window has wrapped twice, F frames a chunk; then chunks opened again."""

    sinks: int
    window: int
    frames: int
    alpha: float | tuple[float, ...] = 0.5
    positions: str = "before_window"
    head_dim: int = 32
    group: int = 1
    pairing: str | None = "interleaved"
    batch: int = 1  # more than one: of different ages
    layers: int = 1
    kv_heads: int = 1
    size: tuple[int, int] = (2, 3)

    def __str__(self) -> str:
        shape = f"S{self.sinks}-W{self.window}-F{self.frames}-B{self.batch}-L{self.layers}"
        heads = f"D{self.head_dim}-H{self.group * self.kv_heads}:{self.kv_heads}"
        return f"{shape}-{heads}-{self.alpha}-{self.positions}-{self.pairing}"


LIVES = [
    Life(**row)
    for row in pairwise(
        {
            "sinks": (0, 1, 2, 3),
            "window": (1, 3, 6),
            "frames": (1, 2, 3, 5),
            "alpha": (0.0, 0.5, 0.999, 1.0),
            "positions": ("before_window", "absolute"),
            "head_dim": (32, 48, 64, 128),
            "group": (1, 2, 4),
            "pairing": ("interleaved", "half", None),
            "batch": (1, 3),
            "layers": (1, 2),
        },
        excluded=lambda row: row.get("frames", 1) > row.get("window", 6),
    )
]


def chunk_sizes(life: Life) -> list[int]:
    """Frames of each chunk; the buffer is exactly full after one of them."""
    sizes, capacity, seen = [], life.sinks + life.window, 0
    while seen < capacity + 2 * life.window:
        sizes.append(min(life.frames, capacity - seen) if seen < capacity else life.frames)
        seen += sizes[-1]
    return sizes


def run_life(backend: str, device: torch.device, dtype: torch.dtype, life: Life, sink_dtype=None) -> oracle.Streams:
    """Attends while N < S, when N = S, in warm-up, at exactly full, at the first eviction and after the last chunk."""
    streams = oracle.Streams(
        backend, device, dtype, rope_of(life.head_dim, life.pairing, life.size), num_layers=life.layers,
        batch_size=life.batch, num_kv_heads=life.kv_heads, head_dim=life.head_dim,
        frame_tokens=life.size[0] * life.size[1], sink_frames=life.sinks, window_frames=life.window, alpha=life.alpha,
        sink_positions=life.positions, sink_dtype=sink_dtype,
    )  # fmt: skip
    capacity = life.sinks + life.window
    for first in range(1, life.batch):  # streams 1, 2, ... start before the others
        streams.begin(life.frames, samples=range(first, life.batch))
        every_layer(streams, life, attending=first == 1)
    seen, reached = 0, set()
    for size in chunk_sizes(life):
        seen += size
        streams.begin(size)
        stage = tuple((seen > edge) - (seen < edge) for edge in (life.sinks, capacity))
        every_layer(streams, life, attending=stage not in reached)
        reached.add(stage)
    some = [0] if life.batch > 1 else None  # the others rest with full caches, of which nothing may leave
    for frames, replace, samples in ((life.frames, life.frames, None), (life.window, life.window // 2, some)):
        streams.begin(frames, replace, samples=samples)
        every_layer(streams, life, attending=True)
    streams.compare_cache()
    return streams


def every_layer(streams: oracle.Streams, life: Life, attending: bool) -> None:
    streams.poison()
    for layer in range(life.layers):
        if attending:
            streams.run_pass(layer, life.group)
        else:
            streams.write(layer)


def stream(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, **options) -> oracle.Streams:
    """One layer, one head, six tokens a frame; options of the cache."""
    common = dict(num_layers=1, batch_size=1, num_kv_heads=1, frame_tokens=6, sink_frames=1, window_frames=2, alpha=0.5)
    return oracle.Streams(backend, device, dtype, rope_of(head_dim, "interleaved", (2, 3)), **common | options)


def run_far_along(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Phases at frame 10**6 are as good as at frame 0."""
    streams = stream(backend, device, dtype, head_dim)
    for _, cache, _ in streams.runs():
        cache.num_frames += 10**6
        cache._set_ages([10**6])
    streams.begin(2)
    streams.run_pass()
    streams.compare_cache()


def run_saturated(backend: str, device: torch.device, head_dim: int, given: torch.dtype) -> None:
    """Keys that a rotation takes out of float16's range, and values that are not within it."""
    streams = stream(backend, device, torch.float16, head_dim)
    big = torch.full((1, 12, 1, head_dim), 60000.0, device=device, dtype=given)
    values = big if given == torch.float16 else 2 * big
    streams.begin(2)
    for name, cache, _ in streams.runs():
        with rf.use_backend(name):
            cache[0].write(big, values)
    assert streams.ours.k.abs().max() == 65504 and streams.ours.v.max() == values.max().clamp(max=65504)
    assert torch.equal(streams.ours.v, streams.plain.v)


# --- chunk attention --------------------------------------------------------------------------------------------------


class Chunk(NamedTuple):
    """The open chunk of streams of the given ages (frames before it was opened), against its frozen past.

    resting: streams that do not advance, whose newest frames are opened again; a young one lacks the first of them.
    """

    ages: tuple[int, ...]
    sinks: int
    window: int
    frames: int
    head_dim: int = 32
    group: int = 1
    pairing: str | None = "interleaved"
    kv_heads: int = 1
    size: tuple[int, int] = (2, 5)
    resting: tuple[int, ...] = ()

    def __str__(self) -> str:
        heads = f"D{self.head_dim}-H{self.group * self.kv_heads}:{self.kv_heads}"
        streams = f"N{self.ages}{'-resting' if self.resting else ''}-S{self.sinks}-W{self.window}-F{self.frames}"
        return f"{streams}-{heads}-{self.pairing}".replace(" ", "")


CHUNKS = [
    Chunk(**row)
    for row in pairwise(
        {
            "ages": ((0,), (2,), (5, 7), (1, 3, 12)),
            "sinks": (0, 1, 2, 3),
            "window": (1, 3, 6),
            "frames": (1, 2, 3, 5),
            "head_dim": (32, 48, 64, 128),
            "group": (1, 2, 4),
            "pairing": ("interleaved", "half", None),
        },
        excluded=lambda row: row.get("frames", 1) > row.get("window", 6),
    )
] + [Chunk((1, 4), 1, 3, 3, resting=(0,))]


def run_chunk(backend: str, device: torch.device, dtype: torch.dtype, case: Chunk) -> None:
    """Output, normaliser and all gradients, through both."""
    rope = rope_of(case.head_dim, case.pairing, case.size)
    batch, tokens = len(case.ages), case.size[0] * case.size[1]
    contexts = []
    for _, run_dtype in oracle.runs(backend, dtype):
        torch.manual_seed(0)
        cache = rf.EMASinkCache(
            num_layers=1, batch_size=batch, num_kv_heads=case.kv_heads, head_dim=case.head_dim, frame_tokens=tokens,
            sink_frames=case.sinks, window_frames=case.window, alpha=0.5, rope=rope, dtype=run_dtype, device=device,
        )  # fmt: skip
        with rf.use_backend("reference"):
            for age in range(max(case.ages)):
                kv = torch.randn(2, batch, tokens, case.kv_heads, case.head_dim, device=device)
                cache.begin_chunk(1, samples=[b for b in range(batch) if age < case.ages[b]])
                cache[0].write(*kv.to(dtype).to(run_dtype))
            cache.begin_chunk(case.frames, samples=[b for b in range(batch) if b not in case.resting])
        contexts.append(cache[0].context())
    heads = (case.group * case.kv_heads, case.kv_heads, case.kv_heads)
    qkv = [
        oracle.uneven(batch, case.frames * tokens, h, case.head_dim, dtype=dtype, device=device, spare=spare)
        for h, spare in zip(heads, oracle.SPARES, strict=True)
    ]
    oracle.compare(
        backend, lambda run, q, k, v: rf.chunk_attention(q, k, v, contexts[run], return_lse=True), qkv, dtype
    )


# --- sink-window attention --------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """Sizes in tokens; with a three-axis rope (``size``) they are whole frames."""

    queries: int
    keys: int
    sinks: int
    window: int
    chunk: int = 1
    first: int | None = None
    own: bool = True
    pairing: str | None = None
    size: tuple[int, int] | None = None
    head_dim: int = 32
    group: int = 1
    kv_heads: int = 1
    batch: int = 1

    def __str__(self) -> str:
        mask = f"{self.queries}of{self.keys}-S{self.sinks}-W{self.window}-C{self.chunk}-first{self.first}"
        heads = f"B{self.batch}-D{self.head_dim}-H{self.group * self.kv_heads}:{self.kv_heads}"
        own = "" if self.own else "-not_own"
        return f"{mask}{own}-{heads}-{self.pairing}{'' if self.size is None else self.size}".replace(" ", "")


def _windows() -> list[Window]:
    rows = pairwise(
        {
            "unit": (1, 6),  # tokens that the counts below are multiples of
            "queries": (3, 7, 11),  # of 11; in tenths of the keys where the unit is a token
            "sinks": (0, 1, 4),
            "window": (1, 3, 20),
            "chunk": (1, 3),
            "first": (None, 1, 2),
            "own": (True, False),
            "rope": (None, "interleaved", "half"),
            "head_dim": (32, 48, 64, 128),
            "group": (1, 2, 4),
            "batch": (1, 2),
        }
    )
    cases = []
    for row in rows:
        unit, pairing = row.pop("unit"), row.pop("rope")
        scale = unit if unit > 1 else 6
        first = row.pop("first")
        row["queries"] *= scale
        counts = {name: row.pop(name) * unit for name in ("sinks", "window", "chunk")}
        size = (2, 3) if unit == 6 and pairing else None
        first = None if first is None else first * unit
        cases.append(Window(keys=11 * scale, pairing=pairing, size=size, first=first, **counts, **row))
    return cases


WITHIN_A_FRAME = Window(40, 66, 6, 18, 6, pairing="interleaved", size=(2, 3))  # the first query
WINDOWS = [
    *_windows(),
    Window(33, 70, 40, 10, group=4),  # more sinks than window, tiles end inside both
    Window(66, 66, 0, 100, chunk=7, first=3, head_dim=48),  # everything is in the window
    Window(90, 90, 18, 18, chunk=18, first=6, pairing="half", size=(2, 3), head_dim=128),
    Window(1, 50, 4, 12, pairing="half"),  # one token decoded, one axis of rope
    WITHIN_A_FRAME,
]


def run_window(backend: str, device: torch.device, dtype: torch.dtype, case: Window) -> None:
    """Output, normaliser and all gradients, through both."""
    rope = rope_of(case.head_dim, case.pairing, case.size)
    qkv = [
        oracle.uneven(case.batch, tokens, heads, case.head_dim, dtype=dtype, device=device, spare=spare)
        for tokens, heads, spare in zip(
            (case.queries, case.keys, case.keys),
            (case.group * case.kv_heads, case.kv_heads, case.kv_heads),
            oracle.SPARES,
            strict=True,
        )
    ]
    oracle.compare(
        backend,
        lambda _, q, k, v: rf.sink_window_attention(
            q, k, v, sink_tokens=case.sinks, window_tokens=case.window, chunk_tokens=case.chunk,
            first_chunk_tokens=case.first, own_chunk=case.own, rope=rope, return_lse=True,
        ),
        qkv, dtype,
    )  # fmt: skip


# --- tiles of queries that fill whole waves of processors, and a tail whose keys are shared ---------------------------


def run_tail(backend: str, device: torch.device, dtype: torch.dtype, use: str, tiles: int) -> None:
    """A pass ("prefix"), a chunk or a window of as many tiles of 128 queries, each of which sees 600 keys or more."""
    common = {"head_dim": 64, "kv_heads": tiles}
    if use == "chunk":
        run_chunk(backend, device, dtype, Chunk((12,), 1, 9, 1, size=(7, 11), **common))
    elif use == "window":
        run_window(backend, device, dtype, Window(120, 800, 77, 600, **common))
    else:
        streams = oracle.Streams(
            backend, device, dtype, rf.Rope3D(64, 7, 11), num_layers=1, batch_size=1, num_kv_heads=tiles, head_dim=64,
            frame_tokens=77, sink_frames=1, window_frames=9,
        )  # fmt: skip
        for _ in range(11):
            streams.begin(1)
            streams.write()
        streams.run_pass()


# --- Re-DMD loss ------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    mask: str | None  # "frames", "elements", "nothing" selected
    real: bool  # guidance of the real score
    fake: bool  # of the fake score
    shape: tuple[int, ...] = (2, 3, 4, 5, 111)
    contiguous: bool = True

    def __str__(self) -> str:
        guidance = f"{'real' if self.real else ''}{'fake' if self.fake else ''}" or "plain"
        return f"{self.mask}-{guidance}-{self.shape}{'' if self.contiguous else '-strided'}".replace(" ", "")


LOSSES = [
    Loss(**row)
    for row in pairwise(
        {
            "mask": (None, "frames", "elements", "nothing"),
            "real": (False, True),
            "fake": (False, True),
            "shape": ((2, 3, 4, 5, 111), (3, 5), (1, 2, 4097)),
            "contiguous": (True, False),
        }
    )
]


def run_loss(backend: str, device: torch.device, dtype: torch.dtype, case: Loss) -> None:
    """Loss and gradient, with entries of the fake score that are not finite."""
    latents = [torch.randn(case.shape).to(device, dtype) for _ in range(5)]
    if not case.contiguous:
        latents = [x.transpose(1, -1).contiguous().transpose(1, -1) for x in latents]
    x, fake, real, real_uncond, fake_uncond = latents
    fake[(0,) * (fake.dim() - 1)][:3] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(x)
    weight = torch.rand(case.shape[0], device=device)
    mask = {
        None: lambda: None,
        "frames": lambda: torch.rand(*case.shape[:2], *(1,) * (len(case.shape) - 2), device=device) > 0.5,
        "elements": lambda: torch.rand(case.shape, device=device) > 0.5,
        "nothing": lambda: torch.zeros(case.shape, dtype=torch.bool, device=device),
    }[case.mask]()
    results = []
    for name, run_dtype in oracle.runs(backend, dtype):
        leaf = x.to(run_dtype).detach().requires_grad_()
        with rf.use_backend(name):
            loss = rf.losses.redmd.redmd_loss(
                leaf, fake.to(run_dtype), real.to(run_dtype), real_uncond.to(run_dtype) if case.real else None, weight,
                guidance_scale=2.0, fake_uncond=fake_uncond.to(run_dtype) if case.fake else None,
                fake_guidance_scale=1.5, mask=mask,
            )  # fmt: skip
        results.append([loss, torch.autograd.grad(3 * loss, leaf)[0]])
    for name, *triple in zip(("loss", "grad"), *results, strict=True):
        oracle.check(name, *triple, torch.float32 if name == "loss" else dtype)
    budget.check_unbiased(results[0][1], results[2][1], "grad", dtype)
