"""What EMA-Sink does to real video: ``python -m rfkernels demo``.

A camera pans and zooms over photographs that ship inside scikit-image. The 2-D DCT of every patch (orthonormal, as in
JPEG) serves as query, key and value, so that attention finds patches that look alike and a sink can be turned back
into a picture. Each chunk takes three passes, from blurred to sharp, as in few-step denoising.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from . import reference
from .arguments import open_frames
from .attention import streaming_attention
from .backends import use_backend
from .cache import EMASinkCache
from .rope import Rope3D

PATCH, ROWS, COLUMNS, HEADS = 8, 10, 16, 3
TOKENS, HEAD_DIM = ROWS * COLUMNS, PATCH * PATCH  # 3 colours * 64 pixels = 3 heads * 64
CHUNK = 3
BLUR = (9, 5, 1)  # box filter of each pass; the last one is the clean frame
SCENES = ("astronaut", "coffee", "chelsea", "astronaut")
COMPARED = 4  # every fourth chunk is compared with the float64 reference, which attends slowly

# name, sink frames, window frames, alpha, dtype, sink_dtype; rows with the same geometry and alpha are neighbours
VARIANTS = (
    ("no sink", 0, 9, 1.0, torch.float32, None),
    ("static sink", 3, 6, 1.0, torch.float32, None),
    ("EMA 0.99", 3, 6, 0.99, torch.float32, None),
    ("EMA 0.99", 3, 6, 0.99, torch.bfloat16, torch.bfloat16),
    ("EMA 0.999", 3, 6, 0.999, torch.float32, None),
    ("EMA 0.999", 3, 6, 0.999, torch.bfloat16, None),
    ("EMA 0.999", 3, 6, 0.999, torch.bfloat16, torch.bfloat16),
)


@dataclass
class Result:
    """One cache's run; the lists have an entry per chunk. Distances are of sink_v, relative to its first frames."""

    name: str
    dtype: str
    averaging: str  # dtype of the moving average, "-" where there is none
    nbytes: int
    frames_per_second: float = 0.0
    deviation: float = 0.0  # largest |out - reference|, relative to the largest |reference|
    mass: list[float] = field(default_factory=list)  # share of attention on the sink
    moved: list[float] = field(default_factory=list)  # distance from where the sink began
    exact: list[float] = field(default_factory=list)  # the same distance of the exact average
    error: list[float] = field(default_factory=list)  # distance from the exact average
    picture: torch.Tensor | None = None  # sink slot 0 at the end, as an image

    @property
    def mixed(self) -> bool:
        """A bfloat16 cache with float32 averages."""
        return (self.dtype, self.averaging) == ("bfloat16", "float32")

    @property
    def label(self) -> str:
        averaged = "" if self.averaging == "-" else f", averaged in {self.averaging}"
        return self.name + averaged + (", bfloat16 cache" if self.mixed else "")


# --- video and features -----------------------------------------------------------------------------------------------


def video(frames: int) -> torch.Tensor:
    """``[frames, 3, height, width]`` in -1..1: one pan and zoom over each scene's photograph."""
    from skimage import data

    photographs = {name: torch.from_numpy(getattr(data, name)()).permute(2, 0, 1)[None] for name in set(SCENES)}
    clip = []
    for number in range(frames):
        scene, u = divmod(number * len(SCENES) / frames, 1)
        image = photographs[SCENES[int(scene)]].float() / 127.5 - 1
        size = 0.5 + 0.15 * math.cos(2 * math.pi * u)  # part of the width that is seen
        tall = size * ROWS / COLUMNS * image.shape[3] / image.shape[2]
        x, y = (1 - size) * math.sin(2 * math.pi * u), -0.6 * (1 - tall) * math.cos(2 * math.pi * u)
        camera = torch.tensor([[[size, 0, x], [0, tall, y]]])
        grid = F.affine_grid(camera, (1, 3, 2 * ROWS * PATCH, 2 * COLUMNS * PATCH), align_corners=False)
        clip.append(F.avg_pool2d(F.grid_sample(image, grid, align_corners=False), 2))  # sampled twice as fine
    return torch.cat(clip)


def _dct(n: int) -> torch.Tensor:
    rows, columns = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * (columns + 0.5) * rows) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


PROJECTION = torch.kron(_dct(3), torch.kron(_dct(PATCH), _dct(PATCH)))  # colour, row, column; orthonormal


def embed(frames: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k (also the queries) and v, float32 ``[1, frames * TOKENS, HEADS, HEAD_DIM]``: v the DCT of each patch, k v at
    unit RMS. Frequencies are dealt out to the heads in turn, so that each sees fine and coarse detail."""
    patches = frames.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3)
    v = (patches.double() @ PROJECTION.T).reshape(1, -1, HEAD_DIM, HEADS).transpose(2, 3)
    k = v / v.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-3)
    return k.float(), v.float()


def picture(v: torch.Tensor) -> torch.Tensor:
    """Undoes `embed` for the v ``[TOKENS, HEADS, HEAD_DIM]`` of one frame: an image ``[height, width, 3]`` in 0..1."""
    patches = (v.double().transpose(1, 2).flatten(1) @ PROJECTION).reshape(ROWS, COLUMNS, 3, PATCH, PATCH)
    return ((patches.permute(0, 3, 1, 4, 2).reshape(ROWS * PATCH, COLUMNS * PATCH, 3) + 1) / 2).clamp(0, 1)


# --- streams ----------------------------------------------------------------------------------------------------------


def _cache(sink: int, window: int, alpha: float, dtype: torch.dtype, sink_dtype: torch.dtype | None) -> EMASinkCache:
    return EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, frame_tokens=TOKENS, sink_frames=sink,
        window_frames=window, alpha=alpha, rope=Rope3D(HEAD_DIM, ROWS, COLUMNS), dtype=dtype, sink_dtype=sink_dtype,
    )  # fmt: skip


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def exact_stream(clip: torch.Tensor, sink: int, window: int, alpha: float) -> tuple[list, dict[int, torch.Tensor]]:
    """The float64 reference: sink_v in every chunk, and the outputs of every fourth one.

    Only clean frames are written, since the last pass replaces what the passes before it wrote.
    """
    cache, sinks, outputs = _cache(sink, window, alpha, torch.float64, None), [], {}
    with use_backend("reference"):
        for number, frames in enumerate(clip.split(CHUNK)):
            k, v = embed(frames)
            cache.begin_chunk(len(frames))
            if number % COMPARED:
                cache[0].write(k, v)
            else:
                outputs[number] = streaming_attention(k, k, v.double(), cache[0])
            sinks.append(cache.sink_v.clone())
    return sinks, outputs


def sink_mass(q: torch.Tensor, cache: EMASinkCache, lse: torch.Tensor) -> float:
    """The share of the open chunk's attention that goes to the sink: ``exp(lse over the sink - lse)``, averaged."""
    tokens = cache.geometry.sink_frames * TOKENS
    if tokens == 0:
        return 0.0
    q = reference.rotate(q, open_frames(cache.num_frames, cache.open_frames), cache.rope_tables)
    sink = cache[0].k[:, :tokens]
    _, sink_lse = reference.dense_attention(q, sink, sink, None, HEAD_DIM**-0.5)
    return (sink_lse - lse).exp().mean().item()


def stream(clip: torch.Tensor, variant: tuple, sinks: list, outputs: dict[int, torch.Tensor]) -> Result:
    """Streams the clip through one cache and compares it with the results of `exact_stream`."""
    name, *arguments = variant
    cache, alpha = _cache(*arguments), variant[3]
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (cache.dtype, cache.sink_dtype)]
    result = Result(name, dtypes[0], dtypes[1] if alpha < 1 else "-", cache.nbytes)
    seconds, start = 0.0, sinks[0]
    size = start.norm().item() or 1.0
    for number, frames in enumerate(clip.split(CHUNK)):
        passes = [embed(F.avg_pool2d(frames, b, 1, b // 2, count_include_pad=False)) for b in BLUR]
        begin = time.perf_counter()
        cache.begin_chunk(len(frames))
        for k, v in passes:
            out, lse = streaming_attention(k, k, v, cache[0], return_lse=True)
        seconds += time.perf_counter() - begin
        result.mass.append(sink_mass(k, cache, lse))
        sink = cache.sink_v.double()
        for values, a, b in ((result.moved, sink, start), (result.exact, sinks[number], start),
                             (result.error, sink, sinks[number])):  # fmt: skip
            values.append((a - b).norm().item() / size)
        if number in outputs:
            expected = outputs[number]
            result.deviation = max(result.deviation, ((out - expected).abs().max() / expected.abs().max()).item())
    result.frames_per_second = len(clip) / seconds
    if cache.geometry.sink_frames:
        result.picture = picture(cache.sink_v[0, 0, :TOKENS])
    return result


def compare(clip: torch.Tensor) -> list[Result]:
    """Streams the clip through every cache of `VARIANTS`; a progress line on a terminal only.

    On one thread: these are many small operations, whose threads would mostly wait for each other on a machine that is
    also doing something else.
    """
    results = []
    for (sink, window, alpha), group in itertools.groupby(VARIANTS, key=lambda variant: variant[1:4]):
        if sys.stderr.isatty():
            print(f"\r{len(results)} of {len(VARIANTS)} caches", end="", file=sys.stderr, flush=True)
        with _one_thread():
            sinks, outputs = exact_stream(clip, sink, window, alpha)
            results += [stream(clip, variant, sinks, outputs) for variant in group]
    if sys.stderr.isatty():
        print("\r" + " " * 40 + "\r", end="", file=sys.stderr, flush=True)
    return results


# --- report -----------------------------------------------------------------------------------------------------------

HEADINGS = ("cache", "dtype", "average in", "frames /s", "cache bytes", "sink mass", "sink moved", "exact moved",
            "largest error")  # fmt: skip


def table(results: list[Result]) -> list[tuple[str, ...]]:
    """A row of text per cache, under `HEADINGS`."""
    rows = []
    for r in results:
        mass = sum(r.mass[1:]) / max(1, len(r.mass) - 1)  # in the first chunk the sink is the chunk itself
        moved = (f"{r.moved[-1]:.1%}", f"{r.exact[-1]:.1%}") if r.picture is not None else ("-", "-")
        rows.append((r.name, r.dtype, r.averaging, f"{r.frames_per_second:.0f}", str(r.nbytes), f"{mass:.1%}", *moved,
                     f"{r.deviation:.1e}"))  # fmt: skip
    return rows


def print_table(rows: list[tuple[str, ...]]) -> None:
    headings = [heading.partition(" ")[::2] for heading in HEADINGS]  # two lines keep it within 80 columns
    try:
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [*zip(*headings, strict=True), *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    printed = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for number, heading in enumerate(headings):
        printed.add_column("\n".join(heading), justify="left" if number < 3 else "right", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 100).print(printed)


def plot(clip: torch.Tensor, results: list[Result], path: Path) -> None:
    """The figure: frames and final sinks on top; attention mass, way of the sink and its error below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6.6), dpi=110, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 2.6))
    scenes = [i * len(clip) // len(SCENES) for i in range(len(SCENES) + 1)]
    shown = [a + (b - a) // 8 for a, b in itertools.pairwise(scenes)]
    images = [(f"video, frame {i}", (clip[i].permute(1, 2, 0) + 1) / 2) for i in shown]
    images += [(r.label.replace(", ", "\n"), r.picture) for r in results if r.picture is not None and not r.mixed]
    for axes, (title, image) in zip(top.subplots(1, len(images)), images, strict=True):
        axes.imshow(image.clamp(0, 1).numpy())
        axes.set_title(title, fontsize=8.5)
        axes.set_axis_off()
    top.suptitle("The video, and what sink slot 0 holds at its end (its values turned back into pixels)", fontsize=11)

    frames = [min(len(clip), (i + 1) * CHUNK) for i in range(len(results[0].mass))]
    mass, way, error = panels = bottom.subplots(1, 3)
    for r, style in zip(results, _styles(results), strict=True):
        if r.dtype == "float32":
            mass.plot(frames[1:], r.mass[1:], label=r.name, **style)
        if r.picture is not None:
            way.plot(frames, r.moved, label=r.label, **style)
        if r.averaging != "-":
            error.plot(frames, [e or math.nan for e in r.error], **style)
    mass.axhline(1 / 3, color="0.6", linewidth=1, linestyle=":", label="the sink's share of the tokens")
    mass.set(title="Attention that goes to the sink (the rest: window)", ylabel="share of attention mass")
    way.set(title="How far the sink has moved", ylabel="distance from where it began, relative")
    error.set(title="How far it is from the exact average (lines as left)", ylabel="distance, relative", yscale="log")
    mass.set_ylim(-0.02, 0.5)
    way.set_ylim(top=1.5 * max(max(r.moved) for r in results) + 1e-3)  # room for the legend
    for axes in panels:
        axes.set(xlabel="latent frame", xlim=(0, len(clip)))
        axes.spines[["top", "right"]].set_visible(False)
        for i, ((a, b), scene) in enumerate(zip(itertools.pairwise(scenes), SCENES, strict=True)):
            axes.axvspan(a, b, color="0.95" if i % 2 else "1", zorder=0)
            style = {"fontsize": 8, "color": "0.5", "ha": "center", "va": "top"}
            axes.text((a + b) / 2, 1.0, scene, transform=axes.get_xaxis_transform(), **style)
    mass.legend(fontsize=8, frameon=False, loc="upper right", bbox_to_anchor=(1, 0.96), ncols=2)
    way.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, 0.96))
    figure.savefig(path)


def _styles(results: list[Result]) -> list[dict]:
    """A colour for each kind of sink; dashes for bfloat16 averages, dots for a bfloat16 cache averaged in float32."""
    colours = dict(zip(dict.fromkeys(r.name for r in results), ("0.6", "black", "tab:blue", "tab:red"), strict=True))
    lines = [":" if r.mixed else "--" if r.averaging == "bfloat16" else "-" for r in results]
    return [{"color": colours[r.name], "linestyle": line} for r, line in zip(results, lines, strict=True)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="where demo.png goes")
    parser.add_argument("--frames", type=int, default=240, help="latent frames to stream (default 240)")


def run(args: argparse.Namespace) -> int:
    """Streams, prints the table and writes ``demo.png``. Returns the exit status."""
    if args.frames < 1:
        print(f"--frames must be at least 1, got {args.frames}", file=sys.stderr)
        return 2
    try:
        import matplotlib  # noqa: F401
        import skimage  # noqa: F401
    except ImportError as error:
        print(f"the demo needs {error.name}: pip install rfkernels[demo]", file=sys.stderr)
        return 1
    begin = time.perf_counter()
    clip = video(args.frames)
    results = compare(clip)
    args.out.mkdir(parents=True, exist_ok=True)
    plot(clip, results, args.out / "demo.png")
    print_table(table(results))
    print(
        f"One layer, one thread, {len(BLUR)} passes a chunk of {CHUNK} frames. Error: of the clean pass in every fourth"
    )
    print("chunk, against the float64 reference, relative to its largest output. Moved: distance of")
    print("sink_v from where it began, relative; exact: that of the float64 average.")
    print(f"{args.out / 'demo.png'}, {time.perf_counter() - begin:.0f} s")
    return 0
