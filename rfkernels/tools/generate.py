"""Text to a video file: ``python -m rfkernels generate``.

The folder is laid out as diffusers lays out a Wan pipeline (``transformer``, ``vae``, ``text_encoder``, ``tokenizer``),
or as Wan itself is published. Everything is read from the disk and nothing downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..backends import use_backend
from ..models import CausalWan, CausalWanConfig, StreamingSampler, from_pretrained, load_lora, original
from ..models.checkpoints import read_config
from ..models.progress import frames_bar
from ..models.video import StreamingDecoder, encode_frames, encode_prompts
from .outputs import chosen_device, partial_path, writable_file
from .video_files import open_video, read_frames, write_video

PARTS = ("transformer", "vae", "text_encoder", "tokenizer")
ORIGINAL = {"vae": original.VAE, "text_encoder": original.TEXT_ENCODER, "tokenizer": original.TOKENIZER}
NEEDED = ("av", "diffusers", "transformers")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class UsageError(Exception):
    """What the user can put right; shown without a traceback."""


class Prompt(NamedTuple):
    """From which frame of the video on, and what."""

    frame: int
    text: str


class Video(NamedTuple):
    prompts: list[Prompt]
    seed: int
    out: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=run, left=_left)
    add = parser.add_argument
    add("--model", type=Path, required=True, help=f"folder with {', '.join(PARTS)}, or an original Wan folder")
    given = parser.add_mutually_exclusive_group(required=True).add_argument
    given("--prompt")
    given("--prompts", type=Path, metavar="FILE", help="a text file with a prompt in each line: a video of each")
    add(
        "--switch",
        type=_switch,
        action="append",
        default=[],
        metavar="FRAME: PROMPT",
        help="another prompt from the first chunk that begins at this frame of the video or later; any number of times",
    )
    add("--initial", type=Path, metavar="IMAGE_OR_VIDEO", help="what the video begins with")
    add(
        "--out",
        type=Path,
        default=Path("video.mp4"),
        help="default %(default)s; of several videos the first is video-0.mp4",
    )
    add("--samples", type=int, default=1, help="videos of each prompt, with rising seeds, default %(default)s")
    add("--frames", type=int, default=81, help="video frames, those of --initial included, default %(default)s")
    add("--height", type=int, default=480, help="default %(default)s")
    add("--width", type=int, default=832, help="default %(default)s")
    add("--fps", type=int, default=16, help="default %(default)s")
    add("--seed", type=int, default=0, help="default %(default)s")

    add = parser.add_argument_group("weights").add_argument
    add("--weights", type=Path, help="the transformer's weights, e.g. Reward Forcing's .pt")
    add("--weights-name", metavar="NAME", help="of those in the file, default generator_ema, else generator")
    add("--lora", type=Path, action="append", default=[], help="a LoRA's file or folder; any number of times")
    add("--lora-alpha", type=float, help="where the files do not say, default their rank")
    for part in PARTS[1:]:
        add(
            f"--{part.replace('_', '-')}",
            type=Path,
            help=f"its folder{'' if part == 'tokenizer' else ' or original file'}, default that in --model",
        )

    add = parser.add_argument_group("stream").add_argument
    add("--steps", type=float, nargs="+", default=[1000, 750, 500, 250])
    add("--shift", type=float, default=5.0)
    add("--chunk-frames", type=int, default=3, help="latent frames, default %(default)s")
    add("--first-chunk-frames", type=int, help="latent frames, default --chunk-frames")
    add("--sink-frames", type=int, default=3, help="latent frames, default %(default)s")
    add("--window-frames", type=int, default=6, help="latent frames, default %(default)s")
    add("--alpha", type=float, default=0.999, help="of EMA-Sink; 1 is a static sink. Default %(default)s")
    add(
        "--sink-positions",
        choices=["before_window", "absolute"],
        default="before_window",
        help="before_window: Reward Forcing; absolute: Self Forcing and LongLive. Default %(default)s",
    )
    add(
        "--sink-dtype",
        choices=["float32", "published"],
        default="float32",
        help="in which sinks are averaged; published: in --dtype, as the published code does. Default %(default)s",
    )
    add("--context-noise", type=float, default=0.0, help="timestep of the pass over a clean chunk, default %(default)s")

    add = parser.add_argument_group("machine").add_argument
    add("--dtype", choices=DTYPES, help="default bfloat16 on CUDA, else float32")
    add("--device", help="default cuda where there is one, else cpu")
    add("--backend", default="auto", help="of the ops, see info; default %(default)s")
    add("--compile", action="store_true", help="torch.compile the transformer: minutes at first, faster after")
    add("--cuda-graph", action="store_true", help="replay passes as CUDA graphs (needs a CUDA device)")


def _switch(given: str) -> Prompt:
    frame, colon, text = given.partition(":")
    if not colon or not frame.strip().isdecimal() or not text.strip():
        raise argparse.ArgumentTypeError(f'must be "FRAME: PROMPT", such as "81: it rains", got {given!r}')
    return Prompt(int(frame), text.strip())


def run(args: argparse.Namespace) -> int:
    try:
        videos = _videos(args)
        parts = _check(args, videos)
        with use_backend(args.backend):
            _generate(args, videos, parts)
    except (UsageError, ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _left(args: argparse.Namespace) -> str:
    """What there is when the command was stopped."""
    out = getattr(args, "making", args.out)
    partial = partial_path(out)
    if partial.is_file() and partial.stat().st_size:
        return f"{partial} holds the frames made so far; {out} is not written"
    return f"{out} is not written"


def _videos(args: argparse.Namespace) -> list[Video]:
    """What is to be made: of each prompt a video with each seed."""
    if args.samples < 1:
        raise UsageError(f"--samples must be at least 1, got {args.samples}")
    texts = [args.prompt]
    if args.prompts is not None:
        if args.switch:
            raise UsageError("--switch goes with --prompt, not with --prompts")
        texts = [line.strip() for line in args.prompts.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not texts:
            raise UsageError(f"--prompts must hold a prompt in each line, {args.prompts} has none")
    made = [(text, args.seed + sample) for text in texts for sample in range(args.samples)]
    width = len(str(len(made) - 1))
    outs = [args.out.with_name(f"{args.out.stem}-{i:0{width}}{args.out.suffix}") for i in range(len(made))]
    outs = [args.out] if len(made) == 1 else outs
    return [Video([Prompt(0, text), *args.switch], seed, out) for (text, seed), out in zip(made, outs, strict=True)]


def _check(args: argparse.Namespace, videos: Sequence[Video]) -> dict[str, Path]:
    """Where each part is; everything that is missing is found before anything is loaded."""
    lacking = [package for package in NEEDED if not _importable(package)]
    if lacking:
        raise UsageError(f'generate needs {", ".join(lacking)}: pip install "rfkernels[video]"')
    if args.lora and not _importable("peft"):
        raise UsageError("--lora needs peft: pip install peft")
    parts = _parts(args)
    if args.weights is None and (args.model / "transformer_2").is_dir():
        raise UsageError(
            f"{args.model} holds two transformers, for high and for low noise; generate runs one: --weights"
        )
    for option in ("weights", "initial", "lora"):
        given = getattr(args, option)
        for path in given if isinstance(given, list) else [given]:
            if path is not None and not path.exists():
                raise UsageError(f"--{option} must be a file or folder, there is no {path}")
    if args.frames < 1 or args.fps < 1:
        raise UsageError(f"--frames and --fps must be at least 1, got {args.frames} and {args.fps}")
    frames = [0, *(prompt.frame for prompt in args.switch)]
    if any(a >= b for a, b in zip(frames, [*frames[1:], args.frames], strict=True)):
        raise UsageError(
            f"--switch must be at rising frames from 1 to --frames - 1 = {args.frames - 1}, got {frames[1:]}"
        )
    chosen_device(args.device)
    with use_backend(args.backend):
        pass
    for video in videos:
        writable_file("--out", video.out)
    open_video(partial_path(videos[0].out), args.fps)[0].close()  # nothing is written before the first frame
    return parts


def _parts(args: argparse.Namespace) -> dict[str, Path]:
    parts = {part: getattr(args, part, None) or args.model / part for part in PARTS}
    if not parts["transformer"].is_dir() and (args.model / "config.json").is_file():
        parts["transformer"] = args.model  # the transformer's own folder, e.g. original Wan's
    for part, name in ORIGINAL.items():
        if getattr(args, part) is None and not parts[part].exists() and (args.model / name).exists():
            parts[part] = args.model / name
    lacking = [
        f"{part} ({path}{'' if part == 'transformer' else ', or give --' + part.replace('_', '-')})"
        for part, path in parts.items()
        if not (path.exists() if part in ("vae", "text_encoder") else path.is_dir())
    ]
    if lacking:
        raise UsageError(
            f"{args.model} must be laid out like a diffusers Wan pipeline or an original Wan folder, it lacks "
            f"{'; '.join(lacking)}"
        )
    return parts


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True


def _generate(args: argparse.Namespace, videos: Sequence[Video], parts: dict[str, Path]) -> None:
    for video in videos:  # of an earlier command, which are not to pass for this one's
        partial_path(video.out).unlink(missing_ok=True)
    device = chosen_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise UsageError(f"--cuda-graph needs a CUDA device, got --device {device}")
    dtype = DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    config = read_config(parts["transformer"])
    vae = _vae(args, parts["vae"], config).to(device).eval()
    initial = _initial(args, vae)
    texts = list(dict.fromkeys(prompt.text for video in videos for prompt in video.prompts))
    contexts = _encode(texts, parts, config, device, dtype)
    model = _model(args, parts["transformer"], device, dtype, contexts)
    space, rate = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    sampler = StreamingSampler(
        model, args.steps, args.shift, chunk_frames=args.chunk_frames, first_chunk_frames=args.first_chunk_frames,
        sink_frames=args.sink_frames, window_frames=args.window_frames, alpha=args.alpha,
        context_noise=args.context_noise, sink_positions=args.sink_positions,
        sink_dtype=dtype if args.sink_dtype == "published" else None,
        height=args.height // space, width=args.width // space, cuda_graph=args.cuda_graph,
    )  # fmt: skip
    context_of = dict(zip(texts, contexts.split(1), strict=True))
    latent_frames = 1 + math.ceil((args.frames - 1) / rate)
    _check_switches(args, sampler, latent_frames, 0 if initial is None else initial.shape[1], rate)
    for video in videos:
        args.making = video.out
        sampler.reset()
        switches = [(prompt.frame, context_of[prompt.text]) for prompt in video.prompts]
        began = time.perf_counter()
        with frames_bar(args.frames, None) as bar:
            chunks = _stream(sampler, StreamingDecoder(vae), switches, latent_frames, video.seed, initial, rate)
            write_video(video.out, _counted(chunks, args.frames, bar), args.fps, args.frames)
        made = args.frames / (time.perf_counter() - began)
        print(f"{video.out}: {args.frames} frames at {args.fps} frames/s, made at {made:.3g} frames/s")


def _vae(args: argparse.Namespace, path: Path, config: CausalWanConfig) -> Any:
    """In float32, as in Wan."""
    from diffusers import AutoencoderKLWan

    vae = original.vae(path) if path.is_file() else AutoencoderKLWan.from_pretrained(path, local_files_only=True)
    space, (_, rows, columns) = vae.config.scale_factor_spatial, config.patch_size
    if args.height % (space * rows) or args.width % (space * columns) or min(args.height, args.width) < 1:
        multiples = f"multiples of {space * rows} and {space * columns}"
        raise UsageError(f"--height and --width must be {multiples}, got {args.height} and {args.width}")
    if vae.config.z_dim != config.in_channels:
        raise UsageError(f"the VAE must have the transformer's {config.in_channels} channels, got {vae.config.z_dim}")
    return vae


def _initial(args: argparse.Namespace, vae: Any) -> torch.Tensor | None:
    """Latents of --initial: of as many whole latent frames as it has, and fewer than --frames."""
    if args.initial is None:
        return None
    rate = vae.config.scale_factor_temporal
    frames = read_frames(args.initial, args.height, args.width, args.frames)
    whole = 1 + (len(frames) - 1) // rate * rate
    if len(frames) >= args.frames:
        raise UsageError(f"--frames must be more than the frames of --initial, got {args.frames}")
    return encode_frames(vae, frames[None, :whole])


def _encode(
    texts: Sequence[str], parts: dict[str, Path], config: CausalWanConfig, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """The prompts' embeddings, each by itself: the same bits whatever else is asked for, and any number of them.

    The encoder, larger than the transformer, is gone when this returns.
    """
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer, path = AutoTokenizer.from_pretrained(parts["tokenizer"], local_files_only=True), parts["text_encoder"]
    encoder: Any = (
        original.text_encoder(path, dtype)
        if path.is_file()
        else UMT5EncoderModel.from_pretrained(path, local_files_only=True, dtype=dtype)
    )
    encoder = encoder.to(device).eval()
    return torch.cat([encode_prompts(tokenizer, encoder, [text], config.text_len) for text in texts])


def _model(
    args: argparse.Namespace, folder: Path, device: torch.device, dtype: torch.dtype, contexts: torch.Tensor
) -> CausalWan:
    model = from_pretrained(folder, dtype, device, checkpoint=args.weights, weights=args.weights_name).eval()
    if contexts.shape[-1] != model.config.text_dim:
        raise UsageError(
            f"the text encoder must have the transformer's text_dim={model.config.text_dim}, got {contexts.shape[-1]}"
        )
    for index, path in enumerate(args.lora):
        load_lora(model, path, alpha=args.lora_alpha, adapter=f"lora_{index}")
    if args.compile:
        compiled: Any = torch.compile(model)
        return compiled
    return model


def _check_switches(
    args: argparse.Namespace, sampler: StreamingSampler, latent_frames: int, initial: int, rate: int
) -> None:
    """Raises where a switch comes after the last chunk has begun."""
    last = sampler.settings.chunks(latent_frames - initial, initial)[-1]
    start = _video_frame(latent_frames - last, rate)
    if args.switch and args.switch[-1].frame > start:
        raise UsageError(f"--switch must be at most {start}, where the last chunk begins, got {args.switch[-1].frame}")


def _video_frame(latent_frame: int, rate: int) -> int:
    """The first frame of the video that belongs to a latent frame."""
    return max(0, 1 + rate * (latent_frame - 1))


def _stream(
    sampler: StreamingSampler,
    decoder: StreamingDecoder,
    switches: list[tuple[int, torch.Tensor]],
    latent_frames: int,
    seed: int,
    initial: torch.Tensor | None,
    rate: int,
) -> Iterator[torch.Tensor]:
    """Frames ``[n, 3, H, W]``, chunk by chunk; ``switches`` are (frame of the video, context), the first at 0."""
    switches = list(switches)
    left = latent_frames - (0 if initial is None else initial.shape[1])
    chunks = sampler.stream(switches.pop(0)[1], left, seed=seed, initial=initial, progress=False)
    if initial is not None:
        yield decoder.decode(initial)[0]
    for _ in sampler.settings.chunks(left, sampler.frames):
        due = None
        while switches and switches[0][0] <= _video_frame(sampler.frames, rate):
            _, due = switches.pop(0)
        if due is not None:
            sampler.switch(due)
        yield decoder.decode(next(chunks))[0]


def _counted(chunks: Iterator[torch.Tensor], frames: int, bar: Any) -> Iterator[torch.Tensor]:
    for chunk in chunks:
        yield chunk
        bar.update(min(len(chunk), frames))
        frames -= len(chunk)
