"""Passes of a model over a cache as CUDA graphs: recorded once, then replayed.

A pass launches the same work in every pass of every chunk of one length: lengths and positions are read on the device,
where `EMASinkCache.begin_chunk` advances them, and the cache stays where it is. What differs, latents, timesteps and
the prompt's keys and values, is copied into buffers that the graph reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from .. import backends
from ..cache import EMASinkCache
from .wan import KV
from .wrappers import is_sharded

Key = tuple[Any, ...]
_ADAPTERS = ("active_adapters", "active_adapter", "disable_adapters", "merged", "scaling")  # what decides a forward


class Recording(NamedTuple):
    """replay: runs what was recorded, again. out: where that leaves its result."""

    replay: Callable[[], None]
    out: torch.Tensor


class CudaGraphs:
    """Records what a function launches on a device. Its graphs share one pool of memory: they never run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self._pool: Any = None
        self._stream: Any = None  # of this device, which torch.cuda.graph's own need not be

    def record(self, function: Callable[[], torch.Tensor]) -> Recording:
        """Nothing has run when this returns. Other threads may use the device meanwhile."""
        if self._pool is None:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self.device)
        graph = torch.cuda.CUDAGraph()
        options: dict[str, Any] = {"pool": self._pool, "stream": self._stream, "capture_error_mode": "thread_local"}
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            try:
                with torch.cuda.graph(graph, **options):
                    out = function()
            finally:
                torch.cuda.set_stream(current)  # a capture that fails leaves its own stream current
        return Recording(graph.replay, out)


class _Pass(NamedTuple):
    """The buffers that a recorded pass reads, and the recording."""

    latents: torch.Tensor
    timesteps: torch.Tensor
    texts: list[torch.Tensor]
    recording: Recording


class PassGraphs:
    """Calls ``model(latents, timesteps, context, cache)``: recorded at the second pass of a kind, then replayed.

    A kind: the latents' shape, the prompt's, the backend, and what of the cache the host tells that backend. The first
    pass of a kind runs plainly, which compiles and allocates what the recording needs. All recordings are dropped where
    the model is another one than they were made of (`renew`).

    Args:
        model: a `CausalWan`, or what wraps one. cache: written in place.

    Raises:
        ValueError: another model, not on a CUDA device, or weights that are elsewhere or sharded.
    """

    def __init__(self, model: Any, cache: EMASinkCache):
        _check(model, cache.device)
        self.model, self.cache = model, cache
        self._graphs = CudaGraphs(cache.device)
        self._seen: set[Key] = set()
        self._passes: dict[Key, _Pass] = {}
        self._state: Key = ()

    def renew(self) -> None:
        """Before the passes of a chunk: drops recordings that no longer are what the model would do.

        Seen are weights and buffers that have moved, training mode, and LoRAs that were added, switched or scaled.
        Values that change in place need nothing.
        """
        state = _state(self.model)
        if state != self._state:
            self._seen.clear()
            self._passes.clear()
            self._state = state

    def __call__(self, latents: torch.Tensor, timestep: float, context: Sequence[KV]) -> torch.Tensor:
        """The flow; what it returns is overwritten by the next pass of its kind."""
        texts = [x for kv in context for x in kv]
        key = self._kind(latents, texts)
        if key not in self._seen:
            flow = self.model(latents, _timesteps(latents, timestep), context, self.cache)
            self._seen.add(key)
            return flow
        if key not in self._passes:
            self._passes[key] = self._record(latents, texts)
        found = self._passes[key]
        found.latents.copy_(latents)
        found.timesteps.fill_(timestep)
        torch._foreach_copy_(found.texts, texts)
        found.recording.replay()
        self.cache._written = True
        return found.recording.out

    def _record(self, latents: torch.Tensor, texts: list[torch.Tensor]) -> _Pass:
        with torch.inference_mode(False):  # kept beyond the call
            x, times = latents.clone(), _timesteps(latents, 0.0)
            held = [text.clone() for text in texts]
        context = list(zip(held[::2], held[1::2], strict=True))
        recording = self._graphs.record(lambda: self.model(x, times, context, self.cache))
        return _Pass(x, times, held, recording)

    def _kind(self, latents: torch.Tensor, texts: list[torch.Tensor]) -> Key:
        cache = self.cache
        choice = backends.choose("streaming_attention", cache.device, cache.dtype, cache.head_dim)
        full = choice.reads_full and cache.full
        autocast = torch.is_autocast_enabled(cache.device.type) and torch.get_autocast_dtype(cache.device.type)
        shapes = {(x.shape, x.dtype) for x in texts}
        return latents.shape, latents.dtype, frozenset(shapes), choice.backend, full, autocast


def _timesteps(latents: torch.Tensor, timestep: float) -> torch.Tensor:
    return torch.full((len(latents),), timestep, device=latents.device)


def _check(model: Any, device: torch.device) -> None:
    if not isinstance(model, nn.Module):  # what stands for a model, whose weights and adapters nobody here knows
        raise ValueError(f"cuda_graph needs a CausalWan, got a {type(model).__name__}")
    if device.type != "cuda":
        raise ValueError(f"cuda_graph needs a CUDA device, the model is on {device}")
    for name, weight in model.named_parameters():
        if is_sharded(weight):
            raise ValueError(f"cuda_graph needs whole weights, got {name} sharded")
        if weight.device != device:
            raise ValueError(f"cuda_graph needs all weights on {device}, got {name} on {weight.device}")


def _state(model: Any) -> Key:
    """What a recording holds of the model: where its tensors are, and what its modules were told."""
    found: list[Any] = []
    for module in model.modules():
        found.append(module.training)
        for x in (*module._parameters.values(), *module._buffers.values()):
            if x is not None:
                found.append((x.data_ptr(), x.dtype, x.shape))
        if "base_layer" in module._modules or "modules_to_save" in module._modules:  # adapters of peft
            found += (repr(getattr(module, name, None)) for name in _ADAPTERS)
    return tuple(found)
