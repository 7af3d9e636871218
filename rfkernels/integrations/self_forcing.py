"""Models of the Self-Forcing family on rfkernels, in one line: Self-Forcing, Reward-Forcing, LongLive 1.

`patch` gives the model and its self-attentions other classes, so that weights, names and wrappers (PEFT, DDP) stay.
Pipelines keep passing their list of dicts; an `EMASinkCache` stands behind it (see `family_cache`).
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cache import EMASinkCache
from .family_cache import LayerPast, Rules, Stream, stream_of

_PARTS = ("q", "k", "v", "o", "norm_q", "norm_k", "num_heads", "head_dim", "sink_size", "local_attn_size")


class Family(NamedTuple):
    """What a repository does with what leaves the window, where its sinks stand, and what its attention returns."""

    name: str
    alpha: float
    sink_positions: str
    returns_update: bool
    sink_stays_visible: bool


def patch(
    model: nn.Module,
    *,
    alpha: Any = None,
    sink_positions: str | None = None,
    sink_dtype: torch.dtype | str | None = "published",
) -> Callable[[], None]:
    """Lets a causal Wan model of the Self-Forcing family run on an `EMASinkCache`, its pipelines unchanged.

    Args:
        model: the ``CausalWanModel`` of Self-Forcing, Reward-Forcing or LongLive 1, or a module that holds one
            (``pipeline.generator``; PEFT, DDP, FSDP). Patch between videos, and after FSDP2's ``fully_shard``.
        alpha: as in `EMASinkCache`; default the repository's own: ``compression_alpha`` for Reward-Forcing, else 1. A
            cache that is larger than the window (Reward-Forcing's training) averages nothing by default.
        sink_positions: default the repository's own, "before_window" for Reward-Forcing and for LongLive's infinite
            attention, else "absolute".
        sink_dtype: "published" averages in the cache's dtype, as these repositories do; else as in `EMASinkCache`.

    Returns:
        ``undo()``: gives the model its classes back, and every cache fresh zeros: a video begins anew.

    Raises:
        TypeError: no such model within; ValueError: several, one that is patched already, or a bad option. Calls raise
            ValueError for what a cache cannot represent: other entries in its dicts (quantised or pinned ones), a
            position that is skipped or goes back, a stream that is continued from before the patch.
    """
    if sink_positions not in (None, "before_window", "absolute"):
        raise ValueError(f'sink_positions must be None, "before_window" or "absolute", got {sink_positions!r}')
    if sink_dtype != "published" and not (sink_dtype is None or isinstance(sink_dtype, torch.dtype)):
        raise ValueError(f'sink_dtype must be "published", None or a dtype, got {sink_dtype!r}')
    inner = _causal_model(model)
    attentions = [block.self_attn for block in inner.blocks]
    family = family_of(attentions[0])
    rules = Rules(alpha, family.alpha, sink_positions or family.sink_positions, sink_dtype, family.sink_stays_visible)
    if alpha is not None:
        _check_alpha(alpha, attentions[0])
    streams: weakref.WeakSet[Stream] = weakref.WeakSet()
    swapped: list[tuple[Any, type, type]] = []
    for module, mixin in [(inner, _Model), *((attention, _Attention) for attention in attentions)]:
        own = type(module)
        other = _patched(mixin, own)
        module.__class__ = other
        module.__dict__["_rfkernels"] = (rules, family, streams)
        swapped.append((module, own, other))

    def undo() -> None:
        changed = [type(module).__name__ for module, _, other in swapped if type(module) is not other]
        if changed:
            raise RuntimeError(
                f"the class of {changed[0]} was changed after the patch (fully_shard): it cannot be undone"
            )
        for module, own, _ in swapped:
            module.__class__ = own
            del module.__dict__["_rfkernels"]
        for stream in list(streams):
            stream.release()
        swapped.clear()

    return undo


def family_of(attention: nn.Module) -> Family:
    """The repository that a self-attention is from, by what its class and its module have."""
    if hasattr(attention, "compression_alpha"):
        own_alpha: Any = attention.compression_alpha
        return Family("Reward-Forcing", float(own_alpha), "before_window", False, True)
    if hasattr(sys.modules.get(type(attention).__module__), "block_relativistic_rope"):
        return Family("LongLive, infinite attention", 1.0, "before_window", True, True)
    if "sink_recache_after_switch" in inspect.signature(type(attention).forward).parameters:
        return Family("LongLive", 1.0, "absolute", True, True)
    return Family("Self-Forcing", 1.0, "absolute", False, False)


def _causal_model(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    found: list[Any] = []
    for module in model.modules():
        blocks = module._modules.get("blocks")  # its own: wrappers pass attributes on
        if isinstance(blocks, nn.ModuleList) and len(blocks):
            attention = getattr(blocks[0], "self_attn", None)
            if attention is not None and all(hasattr(attention, part) for part in _PARTS):
                found.append(module)
    if not found:
        raise TypeError(
            "model must hold a causal Wan model: blocks whose self_attn has " + ", ".join(_PARTS) + f"; got "
            f"{type(model).__name__}"
        )
    if len(found) > 1:
        raise ValueError(f"model must hold one causal Wan model, got {len(found)}: patch each by itself")
    if "_rfkernels" in found[0].__dict__:
        raise ValueError("model is patched already: call the undo() of the first patch before")
    return found[0]


def _check_alpha(alpha: Any, attention: Any) -> None:
    """Raises now what the cache would raise at the first pass."""
    EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=attention.num_heads, head_dim=2, frame_tokens=1,
        sink_frames=max(1, attention.sink_size), window_frames=1, alpha=alpha, dtype=torch.float32, device="cpu",
    )  # fmt: skip


@functools.cache
def _patched(mixin: type, own: type) -> type:
    """A class that is ``own`` with another forward, under its name."""
    return type(own.__name__, (mixin, own), {"__module__": own.__module__, "__qualname__": own.__qualname__})


class _Model:
    """Before their forward: opens the chunk, and puts the layers of the cache in place of the dicts."""

    @torch.compiler.disable(recursive=False)  # what it calls is compiled, this is not: host work, once a pass
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        dicts = kwargs.get("kv_cache")
        if dicts is not None:
            x = args[0] if args else kwargs["x"]
            recache = bool(kwargs.get("sink_recache_after_switch", False))
            layers = _open(self, x, dicts, kwargs.get("current_start", 0), recache)
            return super().forward(*args, **(kwargs | {"kv_cache": layers}))  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def _open(model: Any, x: Any, dicts: list[dict[str, Any]], start: int, recache: bool) -> list[LayerPast]:
    """The layers of the cache, the chunk that this call is about open."""
    rules, _, streams = model.__dict__["_rfkernels"]
    sizes = {tuple(sample.shape[-3:]) for sample in x}
    if len(sizes) != 1:
        raise ValueError(f"x must be latents of one size, got {sorted(sizes)}")
    grid = [size // patch for size, patch in zip(sizes.pop(), model.patch_size, strict=True)]
    attention = model.blocks[0].self_attn
    stream = stream_of(dicts, attention, model.freqs, grid, rules)
    streams.add(stream)
    return stream.open(grid[0], int(start), recache)


class _Attention:
    """Their projections and norms, our attention and cache."""

    def forward(
        self, x: torch.Tensor, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        own: Any = self
        if kv_cache is None:
            given = (x, seq_lens, grid_sizes, freqs, block_mask, None, *args)
            return super().forward(*given, **kwargs)  # type: ignore[misc]
        if not isinstance(kv_cache, LayerPast):
            raise RuntimeError("a patched self-attention takes its cache from the model: call the model, not the block")
        shape = (*x.shape[:2], own.num_heads, own.head_dim)
        q, k, v = own.norm_q(own.q(x)).view(shape), own.norm_k(own.k(x)).view(shape), own.v(x).view(shape)
        out = own.o(kv_cache.attend(q, k, v).flatten(2))
        return (out, None) if own.__dict__["_rfkernels"][1].returns_update else out
