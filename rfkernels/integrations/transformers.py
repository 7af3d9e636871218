"""An attention for language models of transformers: sliding windows, the first tokens as sinks, learned sink logits.

transformers gives a registered attention rotated queries and keys, and whatever the function makes that is registered
for masks under the same name: here `Visible`, which says which keys a query sees in three numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from .. import backends, checks
from ..attention import merge_attention, sink_window_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, masking_utils
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        packed_sequence_mask_function,
        sliding_window_overlay,
    )
except ImportError as error:
    raise ImportError(f"rfkernels.integrations.transformers needs transformers >= 4.57: {error}") from error

Tensor = torch.Tensor

# transformers looks for these within a name: another attention, or a repository to download.
_TAKEN = ("/", "|", "sdpa", "flash", "flex", "eager", "kernel:")
# What a model may ask of its attention and this one cannot give, by the name of the argument.
_REFUSED = {
    "softcap": "capped scores",
    "position_bias": "a bias added to the scores",
    "head_mask": "masked heads",
    "cu_seq_lens_q": "packed documents",
    "cu_seq_lens_k": "packed documents",
    "seq_idx": "packed documents",
    "output_attentions": "the matrix of probabilities, which is never formed",
}
# What the functions are for of which transformers makes masks, by their makers' names.
_BIDIRECTIONAL = "a bidirectional layer (leave it out: attn_implementation={'text_config': name})"
_KINDS = {
    "packed_sequence_mask_function": "a batch of packed documents, by position_ids,",
    "remap_positions_for_packed_sequence": "a batch of packed documents, by position_ids,",
    "chunked_overlay": "attention in chunks",
    "blockwise_overlay": "attention in blocks",
    "bidirectional_mask_function": _BIDIRECTIONAL,
    "sliding_window_bidirectional_overlay": _BIDIRECTIONAL,
}


class Visible(NamedTuple):
    """What stands in for a mask: of ``length`` keys the first ``keys`` count, the newest of which are the queries'.

    window: how many keys a query sees, itself included, besides the sinks; None: all up to itself.
    """

    window: int | None
    keys: int
    length: int


class _Options(NamedTuple):
    name: str
    sink_tokens: int
    window_tokens: int | None
    backend: str | None


def register(
    name: str = "rfkernels", *, sink_tokens: int = 0, window_tokens: int | None = None, backend: str | None = None
) -> str:
    """Makes this attention one of transformers': ``from_pretrained(..., attn_implementation=name)``.

    Each layer keeps its own kind: causal where the model is causal, a sliding window where it has one; logits that the
    model learned for a sink (``s_aux``: gpt-oss) join the softmax. Results are those of the model's eager attention,
    gradients included.

    With sinks the first keys stay visible beside the window (StreamingLLM). Keys come rotated, so sinks keep the
    positions they have. A cache has to keep them: `SinkWindowCache` does, so does a ``DynamicCache()`` made without a
    config, which keeps everything.

    Args:
        name: what ``attn_implementation`` takes; a name registered here before gets the new options.
        sink_tokens: >= 0, of layers with a window.
        window_tokens: >= 1, for layers that have no window of their own; None leaves them without.
        backend: as in `rfkernels.sink_window_attention`.

    Returns:
        name.

    Raises:
        ValueError, TypeError: naming the argument; also for a name that is somebody else's. When a model runs:
            ValueError for what this attention cannot say: padding, packed documents, masks other than causal and
            sliding, bidirectional layers, dropout, capped scores, returned probabilities, caches whose length is on
            the device or that dropped the sinks.

    Source: "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453) for sinks in the cache.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {type(name).__name__}")
    taken = [part for part in _TAKEN if part in name]
    if not name or taken:
        raise ValueError(f"name must not be empty or contain any of {', '.join(_TAKEN)}, got {name!r}")
    current = AttentionInterface().get(name)
    if current is not None and getattr(current, "func", None) is not _attend:
        raise ValueError(f"name must not be registered by somebody else, got {name!r}")
    sinks = checks.integer("sink_tokens", sink_tokens, 0)
    window = None if window_tokens is None else checks.integer("window_tokens", window_tokens, 1)
    if backend not in (None, "auto"):
        backends.module(backend)
    options = _Options(name, sinks, window, backend)
    AttentionInterface.register(name, functools.partial(_attend, options))
    AttentionMaskInterface.register(name, functools.partial(_visible, options))
    return name


# --- masks ------------------------------------------------------------------------------------------------------------


def _visible(
    options: _Options,
    *,
    kv_length: int,
    kv_offset: int | Tensor = 0,
    q_length: int = 0,
    q_offset: int | Tensor = 0,
    cache_position: Tensor | None = None,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Visible:
    """What transformers calls once per forward pass and kind of layer, where it would otherwise make a mask.

    cache_position: of the queries ``[N_q]``, from versions that give neither q_length nor q_offset.
    """
    window = _window(mask_function)
    if window is None:
        window = options.window_tokens
    _refuse_padding(attention_mask)
    if isinstance(q_offset, Tensor) or isinstance(kv_offset, Tensor):
        raise ValueError(
            "the cache must know its length on the host, got a tensor, as StaticCache has it: which of its keys are "
            "valid cannot be said. Use a DynamicCache"
        )
    if cache_position is not None:
        q_length = len(cache_position)
        q_offset = _first(cache_position, kv_offset + kv_length - q_length)
    keys = q_offset + q_length - kv_offset  # that are there, from the first one the cache still has
    if keys > kv_length:
        raise ValueError(f"the cache must give a key for each of {keys} tokens, got {kv_length}")
    if kv_offset:
        _check_kept(options.sink_tokens, window, keys - q_length, kv_offset)
    return Visible(window, min(keys, kv_length), kv_length)


def _first(positions: Tensor, without_room: int) -> int:
    """Of the queries' positions the first one; without_room: what it is unless the cache has free places."""
    if not torch.compiler.is_compiling():
        return int(positions[0])
    _assert_all(positions[:1] == without_room, "a static cache")
    return without_room


def _window(mask_function: Callable[..., Any]) -> int | None:
    """The window of a causal mask function; None without.

    Raises:
        ValueError: it is made of anything else than causal masks and sliding windows.
    """
    windows = []
    for part in _parts(mask_function):
        if _code(part) is _SLIDING:
            windows.append(_captured(part, "sliding_window"))
        elif part is not causal_mask_function and not (_code(part) is _PACKED and _is_one_document(part)):
            name = part.__qualname__.split(".")[0]
            raise ValueError(
                "a mask must be causal, with or without a sliding window; "
                f"{_KINDS.get(name, 'another mask function')} cannot be represented, got {name}"
            )
    return min(windows, default=None)


def _parts(mask_function: Any) -> list[Any]:
    """The functions whose intersection a mask function is."""
    if _code(mask_function) is _BOTH:
        return [part for inner in _captured(mask_function, "mask_functions") for part in _parts(inner)]
    if _code(mask_function) is _RENUMBERED:
        # By positions within each document. In one document their differences are those of the indices, and no more is
        # asked for; that there is one is checked by what this comes with (`_is_one_document`).
        return _parts(_captured(mask_function, "mask_function"))
    return [mask_function]


def _is_one_document(part: Any) -> bool:
    """Where transformers could not see whether documents are packed (while it compiles; 4.57 never looks)."""
    number = _captured(part, "packed_sequence_mask")  # of the document of each token, from 0
    if torch.compiler.is_compiling():
        _assert_all(number == 0, "position_ids: packed documents")
        return True
    return not number.any()


def _code(function: Any) -> Any:
    return getattr(function, "__code__", None)


def _captured(function: Any, name: str) -> Any:
    """What a nested function holds, under this name, of the one it was made in."""
    return function.__closure__[function.__code__.co_freevars.index(name)].cell_contents


# By their code, which every function has that the same maker made.
_BOTH = _code(and_masks(causal_mask_function))
_SLIDING = _code(sliding_window_overlay(1))
_PACKED = _code(packed_sequence_mask_function(torch.zeros(1, 1)))
_RENUMBERED: Any = ()  # no code is this: older versions have no such function
if hasattr(masking_utils, "remap_positions_for_packed_sequence"):
    _RENUMBERED = _code(masking_utils.remap_positions_for_packed_sequence(causal_mask_function, torch.zeros(1, 1)))


def _refuse_padding(attention_mask: Tensor | None) -> None:
    """As transformers' own attentions do, this looks at the mask: one read of the device in each forward pass."""
    if attention_mask is None:
        return
    if torch.compiler.is_compiling():
        _assert_all(attention_mask, "attention_mask must be ones: padding")
        return
    padded = (attention_mask == 0).sum(-1)
    if padded.any():
        raise ValueError(
            f"attention_mask must be ones: padding cannot be represented, got {padded.tolist()} padded tokens in the "
            "samples of the batch"
        )


def _assert_all(values: Tensor, what: str) -> None:
    """In a graph that is being compiled: an error when it runs, without a read of the device."""
    torch._assert_async(values.all(), f"{what} cannot be represented by this attention")


def _check_kept(sinks: int, window: int | None, kept: int, dropped: int) -> None:
    """Of a cache that has dropped keys: it has to have kept the sinks and, with each query, a window."""
    needed = None if window is None else sinks + window - 1
    if kept != needed:
        wanted = "all" if needed is None else f"{sinks} sinks and {needed - sinks} for the window"
        raise ValueError(
            f"the cache must keep what this attention sees, {wanted}, got {kept} keys after {dropped} were dropped. "
            "rfkernels.integrations.transformers.SinkWindowCache(config, sink_tokens=...) keeps sinks"
        )


# --- attention --------------------------------------------------------------------------------------------------------


def _attend(
    options: _Options,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **given: Any,
) -> tuple[Tensor, None]:
    """query ``[B, H_q, N_q, D]``, key and value ``[B, H_kv, N_k, D]``; returns ``[B, N_q, H_q, D]``, and None."""
    _check_call(module, dropout, is_causal, given)
    visible = _check_mask(options, attention_mask, key)
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    out, lse = sink_window_attention(
        q, k[:, : visible.keys], v[:, : visible.keys],
        sink_tokens=0 if visible.window is None else options.sink_tokens, window_tokens=visible.window,
        scale=scaling, return_lse=True, backend=options.backend,
    )  # fmt: skip
    if s_aux is None:
        return out, None
    # A key whose value is zero and whose score is the learned logit, whatever the query.
    checks.shape("s_aux", checks.tensor("s_aux", s_aux, 1, q.device), heads=q.shape[2])
    logit = s_aux.to(lse.dtype)[:, None].expand_as(lse)
    return merge_attention(out, lse, out.new_zeros(()).expand_as(out), logit)[0], None


def _check_call(module: torch.nn.Module, dropout: float, causal: Any, given: dict[str, Any]) -> None:
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if not causal:
        raise ValueError(
            f"is_causal must be true, got {causal} in {type(module).__name__}: {_BIDIRECTIONAL} cannot be represented"
        )
    if dropout:
        raise ValueError(f"dropout must be 0 (attention_dropout of the config), got {dropout}")
    for argument, what in _REFUSED.items():
        if given.get(argument) is not None and given[argument] is not False:
            raise ValueError(f"{argument} must be None: {what} cannot be represented, got {_brief(given[argument])}")


def _brief(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _check_mask(options: _Options, mask: Any, key: Tensor) -> Visible:
    if not isinstance(mask, Visible):
        got = "None" if mask is None else _brief(mask) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask must be what {options.name!r} makes for it, got {got}: 4-D masks of one's own and paged "
            "caches cannot be represented"
        )
    if key.shape[2] != mask.length:
        raise ValueError(
            f"key must have the {mask.length} tokens its mask was made for, got {key.shape[2]}: layers of one kind "
            "must have seen the same tokens"
        )
    return mask


# --- a cache that keeps sinks -----------------------------------------------------------------------------------------


class SinkWindowLayer(DynamicSlidingWindowLayer):
    """Keys and values of the first ``sink_tokens`` tokens and of the newest ``sliding_window - 1`` besides."""

    def __init__(self, sliding_window: int, sink_tokens: int):
        super().__init__(sliding_window=sliding_window)
        self.sink_tokens = sink_tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Returns what the new queries may see: what was kept, and the new keys and values."""
        keys, values = DynamicLayer.update(self, key_states, value_states)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = self._keep(keys), self._keep(values)
        return keys, values

    def _keep(self, states: Tensor) -> Tensor:
        if states.shape[-2] <= self._capacity():
            return states
        newest = states[:, :, states.shape[-2] - self.sliding_window + 1 :]
        return torch.cat([states[:, :, : self.sink_tokens], newest], dim=-2)

    def _capacity(self) -> int:
        return self.sink_tokens + self.sliding_window - 1

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """How many keys `update` will return, and how many it has dropped. Older versions give a position per query."""
        query_length = len(query_length) if isinstance(query_length, Tensor) else query_length
        kept = min(self.cumulative_length, self._capacity())
        return kept + query_length, self.cumulative_length - kept

    def get_max_length(self) -> int:
        return self.sink_tokens + self.sliding_window

    def activate_past_recording(self) -> None:
        raise NotImplementedError("a SinkWindowCache cannot go back: assisted decoding needs a DynamicCache")

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.cumulative_length = False, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Raises:
        RuntimeError: keys have been dropped, which would have to come back.
        """
        if self.cumulative_length > self._capacity() and tokens_to_remove:
            raise RuntimeError("a SinkWindowCache cannot be cropped once it has dropped keys")
        DynamicLayer.crop(self, tokens_to_remove)
        self.cumulative_length = 0 if self.keys is None else self.keys.shape[-2]


class SinkWindowCache(DynamicCache):
    """A cache of fixed size for sinks: ``model.generate(..., cache=SinkWindowCache(model.config, sink_tokens=4))``.

    Layers with a sliding window keep the first ``sink_tokens`` tokens and the window. The others keep everything,
    unless ``window_tokens`` says how much, which `register` has to be given too.

    Args:
        config: of the model.
        sink_tokens, window_tokens: as in `register`.

    Raises:
        ValueError, TypeError: naming the argument; ValueError for a model without any window to keep to.
    """

    def __init__(self, config: Any, *, sink_tokens: int, window_tokens: int | None = None):
        sinks = checks.integer("sink_tokens", sink_tokens, 0)
        if window_tokens is not None:
            checks.integer("window_tokens", window_tokens, 1)
        super().__init__(config=config)
        windows = [_layer_window(layer, window_tokens) for layer in self.layers]
        if all(window is None for window in windows):
            raise ValueError("window_tokens must be given for a model without a sliding window, got None")
        self.layers = [
            layer if window is None else SinkWindowLayer(window, sinks)
            for layer, window in zip(self.layers, windows, strict=True)
        ]


def _layer_window(layer: Any, window_tokens: int | None) -> int | None:
    """What a layer of transformers' cache is to keep; None leaves it as it is (linear attention, shared keys)."""
    if type(layer) is DynamicSlidingWindowLayer:
        return layer.sliding_window
    return window_tokens if type(layer) is DynamicLayer else None
