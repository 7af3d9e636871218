"""A minute of video from the small model that comes with the package, and what the sink does to it.

The model (`rfkernels.tools.tiny`) was trained on a camera that moves over five photographs. It streams six conditions
at once through its cache with EMA-Sink, then the same noise without a sink and with a static one.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path

import torch

from .. import backends
from .outputs import chosen_device, finished, writable_folder
from .tiny import clips, metrics, streams

CONDITIONS = (
    ("coffee", "pan right"), ("astronaut", "pan left"), ("stereo_motorcycle", "turn"),
    ("chelsea", "zoom"), ("rocket", "pan up"), ("astronaut", "still"),
)  # fmt: skip
SHOWN = ("no sink", "static sink", "EMA 0.99")  # the last is the video
FILES = ("video.gif", "contact_sheet.png", "sinks.png")
SEGMENT = 24  # latent frames of a point in the plot
SCALE = 4  # pixels of the video for one of the model's


def tiles(frames: torch.Tensor, columns: int = 3) -> torch.Tensor:
    """Videos ``[B, F, 3, h, w]`` in 0..1 side by side, ``[F, rows * h, columns * w, 3]`` in uint8."""
    rows = -(-len(frames) // columns)
    padded = torch.cat([frames, frames.new_zeros(rows * columns - len(frames), *frames.shape[1:])])
    grid = padded.unflatten(0, (rows, columns)).permute(2, 0, 4, 1, 5, 3)
    return (grid.flatten(3, 4).flatten(1, 2) * 255).round().to(torch.uint8)


def write_gif(frames: torch.Tensor, path: Path, frames_per_second: float) -> None:
    """uint8 ``[F, h, w, 3]``, each pixel `SCALE` times as large."""
    from PIL import Image

    large = frames.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2).numpy()
    first, *rest = [Image.fromarray(frame) for frame in large]
    first.save(path, save_all=True, append_images=rest, duration=round(1000 / frames_per_second), loop=0)


def contact_sheet(made: dict[str, streams.Stream], path: Path, columns: int = 12) -> None:
    """A row of frames, equally far apart, for each condition and sink."""
    from matplotlib.figure import Figure

    length = next(iter(made.values())).frames.shape[1]
    shown = sorted({round(i * (length - 1) / max(1, columns - 1)) for i in range(columns)})
    figure = Figure(figsize=(2 + len(shown) * 0.75, 0.8 * len(CONDITIONS) * len(made) + 0.4), dpi=70)
    axes = figure.subplots(len(CONDITIONS) * len(made), len(shown), squeeze=False)
    figure.subplots_adjust(0.2, 0.005, 0.995, 1 - 0.3 / figure.get_figheight(), 0.03, 0.03)
    for row, (condition, (name, stream)) in zip(
        axes, ((i, item) for i in range(len(CONDITIONS)) for item in made.items()), strict=True
    ):
        for ax, frame in zip(row, shown, strict=True):
            ax.imshow(stream.frames[condition, frame].permute(1, 2, 0).numpy())
            ax.set_axis_off()
            if row is axes[0]:
                ax.set_title(str(frame), fontsize=8)
        label = f"{', '.join(CONDITIONS[condition])}\n{name}"
        row[0].text(-0.1, 0.5, label, transform=row[0].transAxes, ha="right", va="center", fontsize=7)
    figure.savefig(path)


def plot(made: dict[str, streams.Stream], path: Path) -> None:
    """Motion and sharpness of every segment, and drift, of each kind of sink."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), dpi=90, layout="constrained")
    motion, sharp, drift = figure.subplots(1, 3)
    for colour, (name, stream) in zip(("0.6", "tab:blue", "tab:red"), made.items(), strict=True):
        moved = metrics.displacement(stream.frames[:-1]).mean(0)  # the still camera is the last
        clear = metrics.sharpness(stream.frames).mean(0)
        for axes, values in ((motion, moved), (sharp, clear)):
            parts = values.split(SEGMENT)
            at = [i * SEGMENT + len(part) / 2 for i, part in enumerate(parts)]
            axes.plot(at, [part.mean().item() for part in parts], marker=".", color=colour, label=name)
        spread = metrics.drift(stream.frames, min(SEGMENT, stream.frames.shape[1] // 2))
        mean, error = streams.summary(spread)
        drift.barh(name, mean, xerr=error, color=colour)
    motion.set(title="Motion: registered displacement", xlabel="latent frame", ylabel="pixels a frame", ylim=(0, None))
    sharp.set(title="Quality: log variance of the Laplacian", xlabel="latent frame")
    drift.set(title="Drift: its spread over segments")
    motion.legend(fontsize=8, frameon=False)
    for axes in (motion, sharp, drift):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run, left=_left)
    parser.add_argument("--out", type=Path, default=Path("demo_output"), metavar="DIR", help="default %(default)s")
    parser.add_argument("--frames", type=int, default=240, help="latent frames, default %(default)s: a minute")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, default %(default)s")
    parser.add_argument("--model", type=Path, metavar="DIR", help="weights, default those that come with the package")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")


def _left(args: argparse.Namespace) -> str:
    """What there is when the command was stopped."""
    return f"what {args.out} held before is unchanged, but for files among {', '.join(FILES)} that were finished"


def _check(args: argparse.Namespace) -> None:
    least = 2 * SEGMENT // 8
    if args.frames < least:
        raise ValueError(f"--frames must be at least {least}, got {args.frames}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    for package in ("matplotlib", "skimage", "tqdm"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'the demo needs {package}: pip install "rfkernels[demo]"')


def run(args: argparse.Namespace) -> int:
    """Streams, and writes the video, the contact sheet and the plot. Returns the exit status."""
    try:
        _check(args)
        device = chosen_device(args.device)
        model = streams.load(args.model, device)
        writable_folder("--out", args.out)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if device.type == "cpu":
        torch.set_num_threads(1)  # on operations this small threads mostly wait for each other
    begin = time.perf_counter()
    conditions = [clips.Condition.named(*names) for names in CONDITIONS]
    backend = backends.choose("streaming_attention", device, model.dtype, model.config.head_dim).backend
    print(f"{len(conditions)} streams of {args.frames} latent frames, backend {backend} on {device}")
    sinks = {sink.name: sink for sink in streams.SINKS}
    made = {}
    for name in SHOWN:
        print(name, file=sys.stderr)
        made[name] = streams.stream(model, conditions, args.frames, sinks[name], args.seed, progress=None)
    video = tiles(made[SHOWN[-1]].frames)
    with finished(args.out / FILES[0]) as path:
        write_gif(video, path, streams.FRAMES_PER_SECOND)
    for name, draw in zip(FILES[1:], (contact_sheet, plot), strict=True):
        with finished(args.out / name) as path:
            draw(made, path)
    segment = min(SEGMENT, args.frames // 2)
    print(f"{'':12} {'frames/s':>9} {'cache bytes':>12} {'motion':>16} {'drift':>16} {'fidelity':>16}")
    for name, stream in made.items():
        values = streams.measure(stream.frames, conditions, segment)
        cells = ["{:.3f} +- {:.3f}".format(*streams.summary(values[key])) for key in ("motion", "drift", "fidelity")]
        speed = stream.frames.shape[0] * stream.frames.shape[1] / stream.seconds
        print(f"{name:12} {speed:9.0f} {stream.nbytes:12} " + " ".join(f"{cell:>16}" for cell in cells))
    print("motion: pixels a frame; drift: spread of log sharpness over segments; fidelity: share of frames that look")
    print("like the photograph asked for. Mean and standard error over the streams.")
    print(f"{args.out}/{', '.join(FILES)}; {time.perf_counter() - begin:.0f} s")
    return 0
