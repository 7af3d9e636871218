"""Streaming with what diffusers has loaded: its Wan transformer, text encoder, VAE and scheduler's settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from .. import checks
from ..models.config import CausalWanConfig
from ..models.progress import frames_bar
from ..models.sampler import StreamingSampler
from ..models.settings import StreamSettings
from ..models.video import StreamingDecoder, encode_frames
from .diffusers_model import DiffusersWan, Seam, StreamingProcessor, patch

__all__ = ["DiffusersWan", "StreamingProcessor", "VideoStream", "patch", "stream"]

_OUTPUTS = ("np", "pt", "pil", "latent")


def stream(
    pipe: Any,
    prompt: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    *,
    height: int = 480,
    width: int = 832,
    num_frames: int | None = 81,
    guidance_scale: float = 1.0,
    seed: int = 0,
    shift: float | None = None,
    initial: Any = None,
    output_type: str = "np",
    prompt_embeds: torch.Tensor | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
    max_sequence_length: int = 512,
    attention_kwargs: dict[str, Any] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> VideoStream:
    """A video from a loaded Wan pipeline of diffusers, chunk by chunk, for as long as wanted at constant memory.

    The procedure is `StreamingSampler`'s, which is that of few-step causal models (Self Forcing; Reward Forcing): load
    such weights, or such a LoRA, into ``pipe.transformer``. Prompts are encoded by the pipeline itself. What it has
    been told about memory holds: offloading of models or of groups of layers, layerwise casting.

    Args:
        pipe: a ``WanPipeline`` of Wan 2.1, or of Wan 2.2 5B (also as ``WanImageToVideoPipeline``).
        prompt: one, or one for each video of the batch; or ``prompt_embeds`` ``[B, n, text_dim]``.
        negative_prompt: with guidance_scale above 1, which doubles the batch; or ``negative_prompt_embeds``.
        height, width: of the video. num_frames: its frames, those of ``initial`` included; None: without end.
        seed: of the noise, which depends on it and the place in the batch only.
        shift: of the schedule. Default: the scheduler's own. Self Forcing, Reward Forcing and LongLive have 5.
        initial: an image, or a video of 1 + 4 n frames (further ones are left out), which the video begins with:
            whatever ``pipe.video_processor.preprocess_video`` takes.
        output_type: "np" (``[B, n, H, W, 3]`` in 0..1), "pt" (``[B, n, 3, H, W]`` in 0..1), "pil" (a list of frames for
            each video), or "latent" (``[B, C, F, h, w]``, not decoded), as the pipeline gives them.
        max_sequence_length: of a prompt, in tokens. attention_kwargs: for the transformer, e.g. a LoRA's ``scale``.
        progress: a bar; default: if tqdm is there and stderr is a terminal.
        options: of `StreamingSampler`: steps, chunk_frames, first_chunk_frames, sink_frames, window_frames, alpha,
            sink_positions, sink_dtype, context_noise, ...

    Returns:
        an iterator over chunks of the video, see `VideoStream`.

    Raises:
        ValueError, TypeError: naming the argument; a pipeline with two transformers, or with image conditioning; a
            scheduler that is not one of flow matching. ImportError: ftfy, where the pipeline needs it.
    """
    if output_type not in _OUTPUTS:
        raise ValueError(f"output_type must be one of {_OUTPUTS}, got {output_type!r}")
    if num_frames is not None:
        checks.integer("num_frames", num_frames, 1)
    config, space = _checked_config(pipe), pipe.vae_scale_factor_spatial
    _check_size(height, width, space, config.patch_size)
    shift = _scheduler_shift(pipe.scheduler) if shift is None else shift
    StreamSettings.split({"shift": shift} | options)  # what is wrong is said before text is encoded
    checks.integer("seed", seed, 0)
    decoder = None if output_type == "latent" else StreamingDecoder(pipe.vae)
    guided = checks.number("guidance_scale", guidance_scale, 1, math.inf) > 1
    _check_prompts(pipe, prompt, prompt_embeds, guided, negative_prompt, negative_prompt_embeds)
    context, negative = _encode(
        pipe, prompt, prompt_embeds, max_sequence_length, do_classifier_free_guidance=guided,
        negative_prompt=negative_prompt, negative_prompt_embeds=negative_prompt_embeds,
    )  # fmt: skip
    model = DiffusersWan(
        pipe.transformer, guidance_scale=guidance_scale, negative=negative if guided else None,
        attention_kwargs=attention_kwargs,
    )  # fmt: skip
    sampler = StreamingSampler(
        model, shift=shift, height=height // space, width=width // space, batch_size=len(context), **options
    )
    sampler.seed = seed
    latents = None
    if initial is not None:
        latents = _initial(pipe, initial, height, width, num_frames, len(context)).to(sampler.cache.device)
    frames = _frames(sampler, decoder, context, num_frames, latents, pipe.vae_scale_factor_temporal, progress)
    return VideoStream(pipe, sampler, frames, output_type, max_sequence_length)


class VideoStream(Iterator[Any]):
    """What `stream` returns: the next chunk of a video, as often as asked.

    Attributes:
        sampler: the `StreamingSampler`, with its cache, snapshots and counts.
    """

    def __init__(
        self,
        pipe: Any,
        sampler: StreamingSampler,
        frames: Generator[torch.Tensor, None, None],
        output_type: str,
        max_sequence_length: int,
    ):
        self.sampler = sampler
        self._pipe, self._frames, self._output_type, self._length = pipe, frames, output_type, max_sequence_length
        self._closed = False

    def __next__(self) -> Any:
        try:
            chunk = next(self._frames).transpose(1, 2)
        except BaseException:  # the end, too
            self.close()
            raise
        if self._output_type == "latent":
            return chunk
        return self._pipe.video_processor.postprocess_video(chunk, output_type=self._output_type)

    def switch(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        prompt_embeds: torch.Tensor | None = None,
        recompute: bool = True,
    ) -> None:
        """Another prompt from the next chunk on; the negative one stays. ``recompute``: see `StreamingSampler.switch`.

        Raises:
            ValueError: before the first chunk, or another number of prompts.
        """
        if self.sampler.frames == 0:
            raise ValueError("switch comes after the first chunk: give that prompt to stream")
        _check_prompts(self._pipe, prompt, prompt_embeds)
        context, _ = _encode(self._pipe, prompt, prompt_embeds, self._length, do_classifier_free_guidance=False)
        self.sampler.switch(context, recompute)

    def close(self) -> None:
        """Ends the video. Models that the pipeline offloads leave the accelerator, as after a call of the pipeline; at
        the end of a video this happens by itself."""
        self._frames.close()
        if not self._closed:
            self._closed = True
            self._pipe.maybe_free_model_hooks()


def _frames(
    sampler: StreamingSampler,
    decoder: StreamingDecoder | None,
    context: torch.Tensor,
    num_frames: int | None,
    initial: torch.Tensor | None,
    rate: int,
    progress: bool | None,
) -> Generator[torch.Tensor, None, None]:
    """``[B, n, 3, H, W]`` in -1..1, chunk by chunk; latents ``[B, F, C, h, w]`` without a decoder."""
    total = None if num_frames is None else 1 + math.ceil((num_frames - 1) / rate)
    left = total if total is None or initial is None else total - initial.shape[1]
    shown = total if decoder is None else num_frames
    done = 0
    with frames_bar(shown, progress) as bar:
        chunks = sampler.stream(context, left, initial=initial, progress=False)
        for latents in chunks if initial is None else itertools.chain([initial], chunks):
            chunk = latents if decoder is None else decoder.decode(latents)
            chunk = chunk if shown is None else chunk[:, : shown - done]
            done += chunk.shape[1]
            bar.update(chunk.shape[1])
            yield chunk


# --- what is taken from the pipeline ----------------------------------------------------------------------------------


def _checked_config(pipe: Any) -> CausalWanConfig:
    """The transformer's sizes, of a pipeline that has what is needed."""
    lacking = [name for name in ("transformer", "vae", "scheduler") if getattr(pipe, name, None) is None]
    if lacking:
        raise ValueError(f"pipe must be a loaded WanPipeline, got {type(pipe).__name__} without {', '.join(lacking)}")
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError("pipe must have one transformer, got two, for high and for low noise: one cache serves one")
    config, channels = Seam(pipe.transformer).config, pipe.vae.config.z_dim
    if channels != config.in_channels:
        raise ValueError(f"pipe.vae must have the transformer's {config.in_channels} channels, got {channels}")
    return config


def _check_size(height: int, width: int, space: int, patch: tuple[int, int, int]) -> None:
    multiples = (space * patch[1], space * patch[2])
    for name, value, multiple in zip(("height", "width"), (height, width), multiples, strict=True):
        if checks.integer(name, value, 1) % multiple:
            raise ValueError(f"{name} must be a multiple of {multiple}, got {value}")


def _check_prompts(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    guided: bool = False,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_embeds: torch.Tensor | None = None,
) -> None:
    if (prompt is None) == (prompt_embeds is None):
        raise ValueError("either prompt or prompt_embeds must be given")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("at most one of negative_prompt and negative_prompt_embeds may be given")
    if not guided and (negative_prompt is not None or negative_prompt_embeds is not None):
        raise ValueError("a negative prompt needs guidance_scale above 1")
    needed = prompt is not None or (guided and negative_prompt_embeds is None)
    if needed and getattr(pipe, "text_encoder", None) is None:
        raise ValueError("pipe must have a text_encoder for prompts, got None: give embeddings")


@torch.no_grad()
def _encode(
    pipe: Any,
    prompt: str | Sequence[str] | None,
    prompt_embeds: torch.Tensor | None,
    max_sequence_length: int,
    **negative: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Embeddings of the prompts and of the negative ones, by the pipeline."""
    texts = prompt if prompt is None or isinstance(prompt, str) else list(prompt)
    try:
        return pipe.encode_prompt(
            prompt=texts, prompt_embeds=prompt_embeds, max_sequence_length=max_sequence_length, **negative
        )
    except NameError as error:  # some pipelines use it whether it is there or not
        if error.name != "ftfy":
            raise
        raise ImportError(f"{type(pipe).__name__} needs ftfy for prompts: pip install ftfy") from error


def _scheduler_shift(scheduler: Any) -> float:
    """The shift of a scheduler of flow matching.

    Raises:
        ValueError: another scheduler, or a shift that depends on the picture's size.
    """
    config = scheduler.config
    flow = config.get("prediction_type", "flow_prediction") == "flow_prediction" and config.get("use_flow_sigmas", True)
    shift = config.get("flow_shift", config.get("shift"))
    if not flow or shift is None or config.get("num_train_timesteps", 1000) != 1000:
        raise ValueError(
            f"pipe.scheduler must be one of flow matching with a fixed shift and 1000 timesteps, got "
            f"{type(scheduler).__name__}: give shift"
        )
    if config.get("use_dynamic_shifting"):
        raise ValueError("pipe.scheduler must have a fixed shift, got use_dynamic_shifting: give shift")
    return float(shift)


def _initial(pipe: Any, initial: Any, height: int, width: int, num_frames: int | None, batch_size: int) -> torch.Tensor:
    """Latents of what the video begins with, ``[B, F, C, h, w]``."""
    frames = pipe.video_processor.preprocess_video(initial, height=height, width=width).transpose(1, 2)
    whole = 1 + (frames.shape[1] - 1) // pipe.vae_scale_factor_temporal * pipe.vae_scale_factor_temporal
    if num_frames is not None and whole >= num_frames:
        raise ValueError(f"num_frames must be more than the {whole} of initial, got {num_frames}")
    if len(frames) not in (1, batch_size):
        raise ValueError(f"initial must be one video, or one for each of {batch_size} prompts, got {len(frames)}")
    return encode_frames(pipe.vae, frames[:, :whole]).expand(batch_size, -1, -1, -1, -1)
