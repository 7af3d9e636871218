"""Argument checks that the public functions share: each error names the argument, what came and what is allowed."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import torch

from .contract.requests import accumulate_dtype
from .rope import Rope3D

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_real(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a real number, NumPy's included. To type checkers float is no `numbers.Real`."""
    return isinstance(value, numbers.Real)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether ``value`` is an integer, NumPy's included, and not a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def tensor(name: str, x: object, rank: int | None = None, device: torch.device | None = None) -> torch.Tensor:
    """``x``, a floating tensor of ``rank`` on ``device``."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {tuple(x.shape)}")
    if device is not None and x.device != device:
        raise ValueError(f"{name} must be on {device}, got {x.device}")
    return x


def no_text(name: str, x: object) -> None:
    """Raises where a prompt, or a list of them, stands for its embeddings."""
    if isinstance(x, str) or (isinstance(x, list | tuple) and any(isinstance(text, str) for text in x)):
        raise TypeError(
            f"{name} must be text embeddings [B, n, text_dim], got text: encode it first, see "
            "rfkernels.models.encode_prompts"
        )


def embeddings(name: str, x: object, device: torch.device | None = None) -> torch.Tensor:
    """``x``, text embeddings ``[B, n, text_dim]`` on ``device``."""
    no_text(name, x)
    return tensor(name, x, 3, device)


def shape(name: str, x: torch.Tensor, **sizes: int | None) -> None:
    """The dimensions of ``x`` in order; None: any size."""
    wanted = tuple(sizes.values())
    if any(want is not None and want != got for want, got in zip(wanted, x.shape, strict=True)):
        layout = ", ".join(key if want is None else f"{key}={want}" for key, want in sizes.items())
        raise ValueError(f"{name} must be [{layout}], got shape {tuple(x.shape)}")


def mask(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``value``, a bool tensor, broadcast to ``like``."""
    if not isinstance(value, torch.Tensor) or value.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, got {getattr(value, 'dtype', type(value).__name__)}")
    if value.device != like.device:
        raise ValueError(f"mask must be on {like.device}, got {value.device}")
    try:
        return value.expand(like.shape)
    except RuntimeError:
        raise ValueError(f"mask must broadcast to {tuple(like.shape)}, got {tuple(value.shape)}") from None


def heads(q: torch.Tensor, kv_heads: int) -> None:
    if q.shape[2] == 0 or q.shape[2] % kv_heads:
        raise ValueError(f"q must have a multiple of {kv_heads} heads (the key heads), got {q.shape[2]}")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` is an integer in ``low..high`` (or the symbol of one, in a trace with dynamic shapes)."""
    if isinstance(value, torch.SymInt):
        symbol: Any = value
        return symbol
    if not is_integer(value):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        allowed = f"at least {low}" if high is None else f"in {low}..{high}"
        raise ValueError(f"{name} must be {allowed}, got {value}")
    return int(value)


def number(name: str, value: object, low: float, high: float, open_low: bool = False) -> float:
    """``value`` is a real number in ``[low, high]`` (``(low, high]``)."""
    if not is_real(value) or not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must be in {'(' if open_low else '['}{low}, {high}], got {value!r}")
    return float(value)


def chunks(chunk_frames: int | Sequence[int], first_chunk_frames: int | None, window_frames: int) -> None:
    """Frames of a chunk, or of one chunk after another, and of a stream's first one; the window holds each."""
    listed = list(chunk_frames) if isinstance(chunk_frames, Sequence) else [chunk_frames]
    if not listed or (isinstance(chunk_frames, Sequence) and first_chunk_frames is not None):
        raise ValueError(
            f"chunk_frames must be one length, or a list of them without first_chunk_frames, got {chunk_frames!r} and "
            f"first_chunk_frames={first_chunk_frames!r}"
        )
    longest = max(integer("chunk_frames", frames, 1) for frames in listed)
    integer("window_frames", window_frames, longest)
    if first_chunk_frames is not None:
        integer("first_chunk_frames", first_chunk_frames, 1, window_frames)


def scale(value: float | None, head_dim: int) -> float:
    """The softmax scale; default ``head_dim ** -0.5``."""
    if value is None:
        return head_dim**-0.5
    if not is_real(value):
        raise TypeError(f"scale must be a number, got {type(value).__name__}")
    return float(value)


def chunk(sizes: tuple[int, int, int, int], device: torch.device, tensors: dict[str, torch.Tensor]) -> None:
    """Raises unless the tensors, by name ("q", "k", "v"), are the tokens of a chunk.

    sizes: ``(batch, tokens, kv_heads, head_dim)``; q may have a multiple of the heads.
    """
    batch, tokens, kv_heads, head_dim = sizes
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.shape == sizes and x.dtype in FLOATING and x.device == device:
            continue  # the usual case, on the hot path
        count = None if name == "q" else kv_heads
        tensor(name, x, 4, device)
        shape(name, x, batch=batch, tokens=tokens, heads=count, head_dim=head_dim)
    if "q" in tensors:
        heads(tensors["q"], kv_heads)


def rope(value: Rope3D | None, head_dim: int, frame_tokens: int | None = None) -> None:
    """``value`` is None or a rope for heads of ``head_dim`` and, if given, frames of ``frame_tokens`` tokens."""
    if value is None:
        return
    if not isinstance(value, Rope3D):
        raise TypeError(f"rope must be a Rope3D or None, got {type(value).__name__}")
    if value.head_dim != head_dim:
        raise ValueError(f"rope must have head_dim={head_dim}, got {value.head_dim}")
    if frame_tokens is not None and value.frame_tokens not in (None, frame_tokens):
        size = f"height * width = {value.height} * {value.width}"
        raise ValueError(f"rope must cover frame_tokens={frame_tokens}, got {size}")


def alphas(alpha: float | Sequence[float] | torch.Tensor, heads: int) -> tuple[float, ...]:
    """alpha of each KV head."""
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.tolist()
    values = tuple(float(a) for a in alpha) if isinstance(alpha, Iterable) else (float(alpha),) * heads
    if len(values) != heads:
        raise ValueError(f"alpha must be one number or one for each of {heads} KV heads, got {len(values)}")
    if not all(0.0 <= a <= 1.0 for a in values):
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    return values


def accumulator(dtype: torch.dtype, sink_dtype: torch.dtype | None) -> torch.dtype:
    """The precision in which a sink of a cache of ``dtype`` is averaged."""
    allowed = {accumulate_dtype(dtype), dtype}
    if sink_dtype is None:
        return accumulate_dtype(dtype)
    if sink_dtype not in allowed:
        raise ValueError(f"sink_dtype must be None or one of {sorted(map(str, allowed))}, got {sink_dtype}")
    return sink_dtype


def samples(given: Iterable[int] | None, batch_size: int) -> list[int]:
    """Host indices of streams, each once, in order; None: all."""
    if given is None:
        return list(range(batch_size))
    if isinstance(given, torch.Tensor) and given.device.type != "cpu":
        raise TypeError(f"samples must be host indices, got a tensor on {given.device}")
    chosen = []
    for sample in given.tolist() if isinstance(given, torch.Tensor) else given:
        integer("samples", sample, -batch_size)
        if sample >= batch_size:
            raise IndexError(f"samples must be below batch_size={batch_size}, got {sample}")
        chosen.append(int(sample) % batch_size)
    return sorted(set(chosen))


def not_in_backward(what: str) -> None:
    """Raises within a backward pass: there, activation checkpointing runs a forward pass again, and a later chunk is
    open by then."""
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"{what} was called within a backward pass, as activation checkpointing does when it recomputes. It would "
            "write into the chunk that is open now: give the checkpointed code cache[i].context() and chunk_attention, "
            "and write after the pass"
        )
