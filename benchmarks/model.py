"""The whole model: one pass split by phase, and a stream from text to pictures (``bench model``, ``bench e2e``).

Weights are random: speed does not depend on them. Phases are found by hooks; marks between them are CUDA events on a
GPU, so that nothing waits while a pass runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import resource
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from unittest import mock

import torch

from rfkernels.models import CausalWan, StreamingSampler, wan
from rfkernels.models.config import PRESETS, CausalWanConfig

from .timing import Timer, no_collections, stats

SIZES = {"tiny": (16, 16), "wan2.1-t2v-1.3b": (60, 104), "wan2.1-t2v-14b": (60, 104)}  # of a latent frame
PASSES = ("pass 1", "pass 2", "pass 3", "pass 4", "context pass")
DECODE = "decoding"


def config(preset: str, device: torch.device) -> CausalWanConfig:
    """The preset; on a CPU of a large one two layers."""
    found = PRESETS[preset]
    small = device.type == "cpu" and preset != "tiny"
    return replace(found, num_layers=2) if small else found


def make(preset: str, device: torch.device) -> CausalWan:
    torch.manual_seed(0)
    with torch.device(device):
        model = CausalWan(config(preset, device))
    return model.eval().requires_grad_(False).to(torch.bfloat16 if device.type == "cuda" else torch.float32)


class Phases:
    """Marks at the borders of phases; inner ones belong to the outermost."""

    def __init__(self, timer: Timer):
        self.timer, self.depth = timer, 0
        self.spans: list[tuple[str, object, object]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self.depth += 1
        start = self.timer.mark() if self.depth == 1 else None
        try:
            yield
        finally:
            self.depth -= 1
            if start is not None:
                self.spans.append((name, start, self.timer.mark()))

    def wrap(self, function, name: str):
        def wrapped(*args, **kwargs):
            with self.phase(name):
                return function(*args, **kwargs)

        return wrapped

    def seconds(self) -> dict[str, float]:
        self.timer.end_round()
        found: dict[str, float] = defaultdict(float)
        for name, start, end in self.spans:
            found[name] += self.timer.between(start, end)
        self.spans.clear()
        return dict(found)


def phases(preset: str, device: torch.device, timer: Timer, rounds: int = 7) -> dict[str, dict]:
    """One later pass over a full window: seconds of each phase, over the rounds.

    The cache's write happens inside the attention op: it is timed by itself right after, and taken from attention.
    """
    model = make(preset, device)
    small = device.type == "cpu" and preset != "tiny"
    height, width = (20, 20) if small else SIZES[preset]  # 100 tokens a frame
    sampler = StreamingSampler(model, height=height, width=width)
    cache, marks = sampler.cache, Phases(timer)
    text = torch.randn(1, model.config.text_len, model.config.text_dim, device=device, dtype=model.dtype)
    latents = torch.randn(1, sampler.settings.chunk_frames, *sampler.shape, device=device)
    timestep = torch.full((1,), 500.0, device=device)
    for block in model.blocks:
        block.ffn.forward = marks.wrap(block.ffn.forward, "feed-forward")
        for attention in (block.self_attn, block.cross_attn):
            for name in "qkvo":
                linear = getattr(attention, name)
                linear.forward = marks.wrap(linear.forward, "projections")
    sdpa = torch.nn.functional.scaled_dot_product_attention
    attended = mock.patch.object(wan, "streaming_attention", marks.wrap(wan.streaming_attention, "attention"))
    crossed = mock.patch.object(wan.F, "scaled_dot_product_attention", marks.wrap(sdpa, "cross-attention"))
    found: dict[str, list[float]] = defaultdict(list)
    shape = (1, sampler.settings.chunk_frames * cache.frame_tokens, cache.num_kv_heads, cache.head_dim)
    k, v = (torch.randn(shape, device=device, dtype=cache.dtype) for _ in range(2))
    with torch.no_grad(), attended, crossed, no_collections():
        kv = model.encode_context(text)
        for i in range(rounds + 4):
            marks.spans.clear()
            with marks.phase("begin_chunk"):
                cache.begin_chunk(sampler.settings.chunk_frames)
            start = timer.mark()
            model(latents, timestep, kv, cache)
            end = timer.mark()
            with marks.phase("write"):
                for layer in cache:
                    layer.write(k, v)
            one = marks.seconds()
            if i < 4:  # until the window is full
                continue
            total = timer.between(start, end)
            begin, write = one.pop("begin_chunk"), one.pop("write")
            one["attention"] -= write
            one["rest"] = total - write - sum(one.values())
            one |= {"cache: write": write, "whole pass": total, "cache: begin_chunk, once a chunk": begin}
            for name, seconds in one.items():
                found[name].append(seconds)
    return {name: stats(values)._asdict() for name, values in found.items()}


# --- from text to pictures --------------------------------------------------------------------------------------------


def make_decoder(preset: str, device: torch.device):
    """diffusers' VAE with random weights, and why there is none."""
    if preset == "tiny":
        return None, "the latents of the tiny preset are pixels"
    if importlib.util.find_spec("diffusers") is None:
        return None, "diffusers is not installed"
    from diffusers import AutoencoderKLWan

    from rfkernels.models.video import StreamingDecoder

    vae = AutoencoderKLWan().eval().requires_grad_(False)
    return StreamingDecoder(vae.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)), None


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def percentiles(values: list[float]) -> dict[str, float]:
    values = sorted(values)
    return {f"p{p}": values[min(len(values) - 1, round(p / 100 * (len(values) - 1)))] for p in (50, 95, 99)}


def end_to_end(
    preset: str, device: torch.device, timer: Timer, chunks: int = 20, compile: bool = False, cuda_graph: bool = False
) -> dict:
    """A stream: the seconds of every part of ``chunks`` chunks with a full window, after one warm-up video.

    text: embeddings to keys and values of all layers, once a prompt (the text encoder itself is another model, not
    timed). First-frame latency: text, first chunk and its decoding, in a warm process.
    """
    model = make(preset, device)
    height, width = (20, 20) if device.type == "cpu" and preset != "tiny" else SIZES[preset]
    made = torch.compile(model) if compile else model
    sampler = StreamingSampler(made, height=height, width=width, cuda_graph=cuda_graph)
    decoder, no_decoder = make_decoder(preset, device)
    marks = Phases(timer)
    sampler._flow = marks.wrap(sampler._flow, "pass")

    def prompt() -> torch.Tensor:
        return torch.randn(1, model.config.text_len, model.config.text_dim, device=device, dtype=model.dtype)

    def one(text: torch.Tensor | None = None) -> dict[str, float]:
        start = timer.mark()
        if text is not None:
            with marks.phase("text"):
                sampler._encoded(text)
        latents = sampler.step()
        made = timer.mark()
        if decoder is not None:
            decoder.decode(latents)
        end = timer.mark()
        timer.end_round()
        names = iter(PASSES)
        row = {}
        for name, *span in marks.spans:
            row[next(names) if name == "pass" else name] = timer.between(*span)
        marks.spans.clear()
        return row | {DECODE: timer.between(made, end), "total": timer.between(start, end)}

    fill = -(-sampler.cache._geometry.capacity // sampler.settings.chunk_frames) + 1
    with torch.no_grad():
        warm_up = [one(prompt() if i == 0 else None)["total"] for i in range(fill)]
        sampler.reset()
        if decoder is not None:
            decoder.reset()
        with no_collections():
            first = one(prompt())
            for _ in range(fill - 1):
                one()
            rows = [one() for _ in range(chunks)]
    totals, decodes = [row["total"] for row in rows], [row[DECODE] for row in rows]
    parts = (*PASSES, *([] if decoder is None else [DECODE]), "total")
    pictures = sampler.settings.chunk_frames * (1 if decoder is None else 4)
    steady = percentiles(totals)
    alone = percentiles([total - decode for total, decode in zip(totals, decodes, strict=True)])
    result = {
        "preset": preset, "layers": model.config.num_layers, "latent": [height, width], "chunks": chunks,
        "decoder": no_decoder or "diffusers' AutoencoderKLWan", "compiled": compile, "CUDA graphs": cuda_graph,
        "parts": {"text, once a prompt": stats([first["text"]])._asdict()}
        | {name: stats([row[name] for row in rows])._asdict() for name in parts},
        "chunk": steady,
        "frames/s without decoding": pictures / alone["p50"],
        "frames/s with decoding": None if decoder is None else pictures / steady["p50"],
        "first-frame latency": first["total"],
        "warm-up beyond the steady speed (compilation, first calls)": sum(warm_up) - fill * steady["p50"],
        "peak memory": _peak(device),
    }  # fmt: skip
    return result
