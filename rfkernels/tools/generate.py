"""Text to a video file: ``python -m rfkernels generate``.

The folder is laid out as diffusers lays out a Wan pipeline: ``transformer``, ``vae``, ``text_encoder``, ``tokenizer``.
Everything is read from the disk and nothing downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..models import CausalWanConfig, StreamingSampler, from_pretrained
from ..models.checkpoints import read_config
from ..models.video import StreamingDecoder, encode_prompts
from .outputs import chosen_device, finished, partial_path, writable_file

if TYPE_CHECKING:
    from av.container import OutputContainer
    from av.video.stream import VideoStream

PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
NEEDED = ("av", "diffusers", "transformers")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class UsageError(Exception):
    """What the user can put right; shown without a traceback."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run, left=_left)
    parser.add_argument("--model", type=Path, required=True, help=f"folder with {', '.join(PARTS)}")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--out", type=Path, default=Path("video.mp4"), help="default %(default)s")
    parser.add_argument("--frames", type=int, default=81, help="video frames, default %(default)s")
    parser.add_argument("--weights", type=Path, help="the transformer's weights, e.g. Reward Forcing's .pt")
    for part in PARTS[1:]:
        parser.add_argument(f"--{part.replace('_', '-')}", type=Path, help=f"its folder, default {part} of --model")
    parser.add_argument("--height", type=int, default=480, help="default %(default)s")
    parser.add_argument("--width", type=int, default=832, help="default %(default)s")
    parser.add_argument("--fps", type=int, default=16, help="default %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, nargs="+", default=[1000, 750, 500, 250])
    parser.add_argument("--shift", type=float, default=5.0)
    parser.add_argument("--chunk-frames", type=int, default=3, help="latent frames, default %(default)s")
    parser.add_argument("--sink-frames", type=int, default=3, help="latent frames, default %(default)s")
    parser.add_argument("--window-frames", type=int, default=6, help="latent frames, default %(default)s")
    parser.add_argument("--alpha", type=float, default=0.999, help="of EMA-Sink; 1 is a static sink")
    parser.add_argument("--dtype", choices=DTYPES, help="default bfloat16 on CUDA, else float32")
    parser.add_argument("--device", help="default cuda where there is one, else cpu")


def run(args: argparse.Namespace) -> int:
    try:
        folders = _check(args)
        _generate(args, folders)
    except (UsageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _left(args: argparse.Namespace) -> str:
    """What there is when the command was stopped."""
    partial = partial_path(args.out)
    if partial.is_file() and partial.stat().st_size:
        return f"{partial} holds the frames made so far; {args.out} is not written"
    return f"{args.out} is not written"


def _check(args: argparse.Namespace) -> dict[str, Path]:
    """The folder of each part; everything that is missing is found before anything is loaded."""
    lacking = [package for package in NEEDED if not _importable(package)]
    if lacking:
        raise UsageError(f'generate needs {", ".join(lacking)}: pip install "rfkernels[video]"')
    folders = {part: getattr(args, part, None) or args.model / part for part in PARTS}
    if not folders["transformer"].is_dir() and (args.model / "config.json").is_file():
        folders["transformer"] = args.model  # the transformer's own folder, e.g. original Wan's
    lacking = [
        f"{part} ({folder}{'' if part == 'transformer' else ', or give --' + part.replace('_', '-')})"
        for part, folder in folders.items()
        if not folder.is_dir()
    ]
    if lacking:
        raise UsageError(f"{args.model} must be laid out like a diffusers Wan pipeline, it lacks {'; '.join(lacking)}")
    if args.weights is None and (args.model / "transformer_2").is_dir():
        raise UsageError(
            f"{args.model} holds two transformers, for high and for low noise; generate runs one: --weights"
        )
    if args.weights is not None and not args.weights.exists():
        raise UsageError(f"--weights must be a file or folder, there is no {args.weights}")
    if args.frames < 1 or args.fps < 1:
        raise UsageError(f"--frames and --fps must be at least 1, got {args.frames} and {args.fps}")
    chosen_device(args.device)
    writable_file("--out", args.out)
    _open_video(partial_path(args.out), args.fps)[0].close()  # nothing is written before the first frame
    return folders


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _generate(args: argparse.Namespace, folders: dict[str, Path]) -> None:
    from diffusers import AutoencoderKLWan

    partial_path(args.out).unlink(missing_ok=True)  # of an earlier command, which is not to pass for this one's
    device = chosen_device(args.device)
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    # float32, as in Wan
    vae = AutoencoderKLWan.from_pretrained(folders["vae"], local_files_only=True).to(device).eval()
    config = read_config(folders["transformer"])
    space, time = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    _, rows, columns = config.patch_size
    if args.height % (space * rows) or args.width % (space * columns):
        multiples = f"multiples of {space * rows} and {space * columns}"
        raise UsageError(f"--height and --width must be {multiples}, got {args.height} and {args.width}")
    if vae.config.z_dim != config.in_channels:
        raise UsageError(f"the VAE must have the transformer's {config.in_channels} channels, got {vae.config.z_dim}")

    context = _encode(args, folders, config, device, dtype)
    model = from_pretrained(folders["transformer"], dtype, device, checkpoint=args.weights).eval()
    sampler = StreamingSampler(
        model, args.steps, args.shift, chunk_frames=args.chunk_frames, sink_frames=args.sink_frames,
        window_frames=args.window_frames, alpha=args.alpha, height=args.height // space, width=args.width // space,
    )  # fmt: skip
    latent_frames = 1 + math.ceil((args.frames - 1) / time)
    decoder = StreamingDecoder(vae)
    chunks = (decoder.decode(chunk)[0] for chunk in sampler.stream(context, latent_frames, seed=args.seed))
    write_video(args.out, chunks, args.fps, args.frames)
    print(f"{args.out}: {args.frames} frames at {args.fps} frames/s")


def _encode(
    args: argparse.Namespace,
    folders: dict[str, Path],
    config: CausalWanConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The prompt's embeddings; the encoder, larger than the transformer, is gone when this returns."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folders["tokenizer"], local_files_only=True)
    encoder: Any = UMT5EncoderModel.from_pretrained(folders["text_encoder"], local_files_only=True, dtype=dtype)
    if encoder.config.d_model != config.text_dim:
        raise UsageError(f"the text encoder must have text_dim={config.text_dim}, got {encoder.config.d_model}")
    return encode_prompts(tokenizer, encoder.to(device).eval(), [args.prompt], config.text_len)


def _open_video(path: Path, fps: int) -> tuple[OutputContainer, VideoStream]:
    """PyAV's container and stream of a video file, which comes to be with its first frame."""
    import av

    try:
        container = av.open(str(path), "w")
        stream = container.add_stream("libx264", rate=fps)
    except ValueError as error:
        raise ValueError(f"out must end in a video format such as .mp4, got {path}") from error
    stream.pix_fmt = "yuv420p"
    return container, stream


def write_video(path: Path, chunks: Iterator[torch.Tensor], fps: int, frames: int | None = None) -> None:
    """Writes chunks ``[n, 3, H, W]`` in -1..1 as they come, at most ``frames`` frames; the format is the suffix's.

    Until all are written the file has another name (`partial_path`); it can be played, and stays after an error.

    Raises:
        ValueError: a suffix that stands for no format that holds H.264.
    """
    left = math.inf if frames is None else frames
    with finished(path) as partial:
        container, stream = _open_video(partial, fps)
        with container:
            try:
                for chunk in chunks:
                    pixels = ((chunk.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
                    left -= _encode_frames(container, stream, pixels.permute(0, 2, 3, 1).cpu(), left)
                    if left <= 0:
                        break
            finally:  # also of what was stopped: the encoder still holds frames
                if stream.codec_context.is_open:
                    container.mux(stream.encode())


def _encode_frames(container: OutputContainer, stream: VideoStream, pixels: torch.Tensor, limit: float) -> int:
    """Encodes uint8 ``[n, H, W, 3]``, at most ``limit`` of them; returns n."""
    import av

    if not stream.codec_context.is_open:
        stream.height, stream.width = pixels.shape[1:3]
    for image in pixels[: int(min(len(pixels), limit))].numpy():
        container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
    return len(pixels)
