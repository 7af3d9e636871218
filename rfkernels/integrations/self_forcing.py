"""One line for models of the Self-Forcing family: their code, their files, this package's cache and attention.

Known are the models of Reward-Forcing, Self-Forcing and LongLive 1 (``causal_model`` and ``causal_model_infinity``).
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from ..rope import Rope3D
from .forcing_streams import Family, KVCache, PassLayer, Stream, window_of

_REWARD = Family("Reward-Forcing", 0.999, "before_window", "before_window")
_LONGLIVE = Family("LongLive", 1.0, "absolute", "absolute", protects_sink=True, returns_update=True)
_INFINITY = _LONGLIVE._replace(name="LongLive's infinity model", sink_positions="before_window")
_SELF = Family("Self-Forcing", 1.0, "absolute", None)

_ARGUMENTS = {
    "self", "x", "seq_lens", "grid_sizes", "freqs", "block_mask", "kv_cache", "current_start", "cache_start",
    "sink_recache_after_switch",
}  # fmt: skip
_ENTRIES = {"k", "v", "global_end_index", "local_end_index"}


def patch(
    model: nn.Module, *, alpha: Any = None, sink_positions: str | None = None, sink_dtype: Any = "published"
) -> Callable[[], None]:
    """Gives a model of the Self-Forcing family this package's cache and attention, in place.

    Pipelines, checkpoints and names of weights stay as they are: only the classes of the model and of every
    ``blocks[i].self_attn`` are replaced by subclasses with another ``forward``. Each list of dicts that is passed as
    ``kv_cache`` gets an `EMASinkCache` of its own, as its ``current_start`` demands; the memory of its ``k`` and ``v``
    is freed, and they become views of that cache. A call with ``current_start`` 0 begins a video. Calls without
    ``kv_cache`` are not changed.

    Args:
        model: their ``CausalWanModel``, or what holds one (``WanDiffusionWrapper``, peft, DDP, FSDP, torch.compile).
        alpha: of the sink, as in `EMASinkCache`. None: what the model's own code does, which is an average with
            ``compression_alpha`` in Reward-Forcing and a static sink elsewhere.
        sink_positions: ``"before_window"`` or ``"absolute"``. None: as the model's own code.
        sink_dtype: ``"published"`` averages in the cache's dtype, as the published weights ran; None in float32.

    Returns:
        undo: takes no argument and puts the classes back. Caches in use are empty then: a video cannot go on.

    Raises:
        ValueError: no model of this family within ``model``, or one that is patched already, or whose attention does
            what this cache cannot (LongLive 2: pinned sinks, a quantised cache); nothing is changed then.
    """
    inner = _causal_model(model)
    attentions = [_self_attention(block) for block in inner.blocks]
    families = {_family(attention) for attention in attentions}
    if len(families) > 1:
        raise ValueError(f"model must do the same in every self-attention, got {len(families)} kinds of them")
    if sink_positions not in (None, "before_window", "absolute"):
        raise ValueError(f'sink_positions must be None, "before_window" or "absolute", got {sink_positions!r}')
    family = families.pop()
    options = {"alpha": alpha, "sink_positions": sink_positions, "sink_dtype": sink_dtype}
    inner._rfkernels = _Patch(family, options)
    swapped = [(inner, _Model)] + [(attention, _SelfAttention) for attention in attentions]
    before = [(module, type(module)) for module, _ in swapped]
    for module, mixin in swapped:
        module.__class__ = _subclass(type(module), mixin, family)
    after = [type(module) for module, _ in swapped]

    def undo() -> None:
        for (module, _), now in zip(before, after, strict=True):
            if type(module) is not now or "forward" in module.__dict__:
                raise RuntimeError(f"undo: {now.__name__} has been wrapped since it was patched; undo that first")
        for module, cls in before:
            module.__class__ = cls
        inner._rfkernels.give_back()
        del inner._rfkernels

    return undo


# --- finding it -------------------------------------------------------------------------------------------------------


def _causal_model(model: Any) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    held = [(m, m._modules.get("blocks")) for m in model.modules()]
    found = [m for m, blocks in held if isinstance(blocks, nn.ModuleList) and len(blocks)]
    if len(found) != 1:
        raise ValueError(f"model must hold one CausalWanModel, a module with blocks, got {len(found)} of them")
    inner: Any = found[0]
    if isinstance(inner, _Model):
        raise ValueError("model is patched already: call what that patch returned first")
    missing = [name for name in ("freqs", "patch_size") if not hasattr(inner, name)]
    if missing or "forward" in inner.__dict__:
        why = f"without {' and '.join(missing)}" if missing else "whose forward is replaced by a hook: patch it before"
        raise ValueError(f"model must be a CausalWanModel, got {type(inner).__name__} {why}")
    return inner


def _self_attention(block: nn.Module) -> Any:
    """Of a block, within whatever is wrapped around either."""
    found = [
        module
        for name, module in block.named_modules()
        if "self_attn" in name.split(".") and {"q", "k", "v", "o"} <= module._modules.keys()
    ]
    if len(found) != 1 or "forward" in found[0].__dict__:
        raise ValueError(
            "model must have one self_attn with q, k, v and o in each block, whose forward no hook replaces (patch "
            f"before adding hooks), got {len(found)}"
        )
    return found[0]


def _family(attention: Any) -> Family:
    forward = type(attention).forward
    arguments = set(inspect.signature(forward).parameters)
    unknown = arguments - _ARGUMENTS
    if unknown or "kv_cache" not in arguments or hasattr(attention, "global_sink_size"):
        what = (
            "global_sink_size"
            if hasattr(attention, "global_sink_size")
            else ", ".join(sorted(unknown)) or "no kv_cache"
        )
        raise ValueError(
            f"model must be of Reward-Forcing, Self-Forcing or LongLive 1, got a self-attention with {what}. What "
            "LongLive 2 does (pinned sinks, a quantised cache) cannot be represented"
        )
    if hasattr(attention, "compression_alpha"):
        return _REWARD._replace(alpha=float(attention.compression_alpha))
    if "sink_recache_after_switch" not in arguments:
        return _SELF
    return _INFINITY if "block_relativistic_rope" in forward.__globals__ else _LONGLIVE


# --- in its place -----------------------------------------------------------------------------------------------------


def _subclass(cls: type, mixin: type, family: Family) -> type:
    """``cls`` under its own name, with the ``forward`` of ``mixin``."""
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (mixin, cls), names | {"_rfkernels_family": family})


class _Model(nn.Module):
    _rfkernels: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kv_cache = kwargs.get("kv_cache")
        if kv_cache is not None:
            x = args[0] if args else kwargs["x"]
            start, rewrites = kwargs.get("current_start", 0), kwargs.get("sink_recache_after_switch", False)
            kwargs = kwargs | {"kv_cache": self._rfkernels.begin_pass(self, x, kv_cache, start, rewrites)}
        return super().forward(*args, **kwargs)


class _SelfAttention(nn.Module):
    _rfkernels_family: Family

    def forward(
        self: Any, x: Any, seq_lens: Any, grid_sizes: Any, freqs: Any, block_mask: Any, kv_cache: Any = None,
        *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        if kv_cache is None:
            return super().forward(x, seq_lens, grid_sizes, freqs, block_mask, kv_cache, *args, **kwargs)
        if not isinstance(kv_cache, PassLayer):
            raise TypeError("self_attn of a patched model is called through the model's forward, which opens the chunk")
        q, k, v = self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        out = self.o(kv_cache.attend(q, k, v).flatten(2))
        return (out, None) if self._rfkernels_family.returns_update else out


class _Patch:
    """The streams of a patched model, by the first tensor of their ``kv_cache``: dicts and lists may be copies."""

    def __init__(self, family: Family, options: dict[str, Any]):
        self.family, self.options = family, options
        self.streams = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: dict) -> _Patch:
        return _Patch(self.family, self.options)

    def give_back(self) -> None:
        for stream in list(self.streams.values()):
            stream.give_back()

    @torch.compiler.disable
    def begin_pass(
        self, model: Any, x: Any, kv_cache: KVCache, current_start: Any, rewrites_sink: bool
    ) -> list[PassLayer]:
        """Opens the chunk of x ``[B, C, F, h, w]`` in the cache of ``kv_cache``; what each layer attends with."""
        depth, *patch = model.patch_size
        frames, height, width = x[0].shape[1] // depth, x[0].shape[2] // patch[0], x[0].shape[3] // patch[1]
        tokens, start = height * width, operator.index(current_start)
        if start < 0 or start % tokens:
            raise ValueError(f"current_start must be whole frames of {tokens} tokens, got {start}")
        key = kv_cache[0]["k"]
        stream = self.streams.get(key) if isinstance(key, torch.Tensor) else None
        if stream is None:
            if start:
                raise ValueError(
                    f"current_start must be 0 in the first pass with a cache, got {start}: a video that began before "
                    "the patch, or with another cache, cannot go on"
                )
            stream = self._new_stream(model, (height, width), kv_cache)
        elif stream.made_for != self._made_for(model, (height, width)):
            raise ValueError(
                f"a cache must be used with the frame and window it was first used with, {stream.made_for} (rows, "
                f"columns, max_attention_size), got {self._made_for(model, (height, width))}: allocate another"
            )
        stream.open(start // tokens, frames, rewrites_sink, kv_cache)
        return stream.layers()

    def _made_for(self, model: Any, grid: tuple[int, int]) -> tuple[int, int, int]:
        return *grid, int(_self_attention(model.blocks[0]).max_attention_size)

    def _new_stream(self, model: Any, grid: tuple[int, int], kv_cache: KVCache) -> Stream:
        _check_cache(kv_cache, len(model.blocks))
        attentions = [_self_attention(block) for block in model.blocks]
        evicts = attentions[0].local_attn_size != -1  # a list of sizes, one for each step, evicts
        sizes = {(attention.sink_size, attention.max_attention_size) for attention in attentions}
        if len(sizes) > 1:
            raise ValueError(f"every layer must have the same sink_size and max_attention_size, got {sorted(sizes)}")
        sink, seen = sizes.pop()
        k = kv_cache[0]["k"]
        alpha, positions = self.options["alpha"], self.options["sink_positions"]
        window = window_of(self.family, sink, k.shape[1], seen, evicts, grid[0] * grid[1], alpha)
        if positions is not None:
            window = window._replace(sink_positions=positions)
        sink_dtype = k.dtype if self.options["sink_dtype"] == "published" else self.options["sink_dtype"]
        options = {"rope": _rope(model.freqs, k.shape[3], grid), "sink_dtype": sink_dtype}
        stream = Stream(self.family, window, self._made_for(model, grid), kv_cache, options)
        self.streams[k] = stream
        return stream


def _check_cache(kv_cache: KVCache, layers: int) -> None:
    """Raises unless it is a list of plain dicts of one shape, dtype and device."""
    if len(kv_cache) != layers:
        raise ValueError(f"kv_cache must have a dict for each of the {layers} layers, got {len(kv_cache)}")
    for layer in kv_cache:
        tensors = [layer.get("k"), layer.get("v")]
        if set(layer) - _ENTRIES or not all(isinstance(x, torch.Tensor) and x.dim() == 4 for x in tensors):
            raise ValueError(
                f"kv_cache must be dicts of k and v [B, tokens, heads, head_dim] and two indices, got {sorted(layer)}: "
                "pinned sinks and quantised caches cannot be represented"
            )
    kinds = {(layer[name].shape, layer[name].dtype, layer[name].device) for layer in kv_cache for name in ("k", "v")}
    if len(kinds) > 1:
        raise ValueError(f"kv_cache must have one shape, dtype and device for all layers, got {len(kinds)} of them")


def _rope(freqs: torch.Tensor, head_dim: int, grid: tuple[int, int]) -> Rope3D:
    """The rope of their table ``[positions, head_dim / 2]``, complex: the default one, or what its second row turns by.

    Raises:
        ValueError: a table whose rows are no multiples of one turn.
    """
    rope = Rope3D(head_dim, *grid)
    table = freqs.detach().to("cpu", torch.complex128)
    default = torch.cat(rope.frequencies)
    steps = table[1].angle()
    if (steps - default).abs().max() > 1e-6:
        rope = Rope3D(head_dim, *grid, frequencies=steps.split(rope.split))
    rows = torch.arange(len(table), dtype=torch.float64)[:, None] * torch.cat(rope.frequencies)
    if (table - torch.polar(torch.ones_like(rows), rows)).abs().max() > 1e-3:
        raise ValueError("model.freqs must turn each pair by the same angle from position to position")
    return rope
