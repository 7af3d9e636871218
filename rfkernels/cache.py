"""EMA-Sink cache: sink frames and a sliding window in one buffer in which nothing moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from . import addresses, backends, cache_state, checks, wan_config
from .contexts import Context, freeze
from .contract import ops
from .contract.geometry import CacheGeometry
from .contract.requests import BeginChunk, CacheTensors, RopeTables, Write, accumulate_dtype
from .rope import Rope3D


class CacheLayer:
    """One layer of an `EMASinkCache`: ``cache[i]``. Its tensors are views into the cache's."""

    def __init__(self, cache: EMASinkCache, index: int):
        self.cache, self.index = cache, index
        k, v, *sinks = cache._tensors
        sink_k, sink_v = (None if x is None else x[index] for x in sinks)
        self._tensors = CacheTensors(k[index], v[index], sink_k, sink_v)
        if not torch.compiler.is_compiling():
            addresses.fixed(*self._tensors)

    @property
    def k(self) -> torch.Tensor:
        """Keys ``[B, (S + W) * T, H_kv, D]``, slots ``[sinks | ring]``, rotated."""
        return self._tensors.k

    @property
    def v(self) -> torch.Tensor:
        """Values ``[B, (S + W) * T, H_kv, D]``, slots as of k."""
        return self._tensors.v

    def write(self, k: torch.Tensor, v: torch.Tensor, backend: str | None = None) -> None:
        """Writes this layer's K and V of the open chunk, replacing what an earlier pass wrote; no gradient.

        Args:
            k, v: ``[B, F * T, H_kv, D]``, un-rotated, any floating dtype (rounded to the cache's, once, after the
                rotation; float16 saturates).
            backend: for this call; default as in `use_backend`.

        Raises:
            ValueError: no chunk is open, or a shape or device that does not fit; TypeError: not floating.
        """
        cache = self.cache
        cache._check_chunk(k=k, v=v)
        choice = backends.choose("write", cache.device, cache.dtype, cache.head_dim, backend)
        checks.not_in_backward("cache[i].write")
        cache._written = True
        with torch.no_grad():
            ops.write(self._write_request(k.detach(), v.detach()), choice.backend)

    def _write_request(self, k: torch.Tensor, v: torch.Tensor) -> Write:
        cache = self.cache
        if cache.nonfinite == "zero":
            k, v = (x.nan_to_num(0.0, 0.0, 0.0) for x in (k, v))
        return Write(self._tensors, cache.num_frames, k, v, cache._rope_tables, cache._geometry)

    def context(self) -> Context:
        """The past of the open chunk, frozen, for `chunk_attention`; the same object until the next `begin_chunk`.

        Raises:
            ValueError: no chunk is open.
        """
        return self.cache._context(self.index)


class EMASinkCache:
    """Keys and values of a stream at constant size: S sink frames, W window frames, one clock for all layers.

    Each frame that leaves the window is fused into sink slot ``frame mod S`` by a moving average,
    ``sink = alpha * sink + (1 - alpha) * frame``, un-rotated keys and values alike ("Reward Forcing", arXiv 2512.04678,
    EMA-Sink). A frame's keys are rotated once, when they are written; frames never move in memory; the valid part is
    always a prefix, so attention over it is dense. `begin_chunk` opens frames; any number of passes
    (`streaming_attention`, ``cache[i].write``) then write into them.

    Args:
        num_layers, batch_size, num_kv_heads, head_dim: sizes.
        frame_tokens: T, tokens of a latent frame (1560 for 832 x 480 in Wan 2.1).
        sink_frames: S >= 0; 0 drops what leaves the window.
        window_frames: W >= 1, the open chunk included.
        alpha: in [0, 1], a number or one for each KV head. 1 is a static sink. Half-life: ``S * ln 0.5 / ln alpha``
            frames. No gradient flows to it.
        rope: `Rope3D`, or None to use keys as given.
        sink_positions: ``"before_window"`` puts the sinks right before the window (Reward Forcing), ``"absolute"``
            leaves slot i at frame i (Self Forcing, LongLive 1).
        dtype: of k and v.
        sink_dtype: None keeps float32 accumulators (float64 for float64 caches). A half ``dtype`` given here too
            reproduces the published arithmetic: averaged in half precision, each product and the sum rounded. With
            bfloat16 and alpha = 0.999 the sink then hardly moves at all.
        nonfinite: ``"keep"``, or ``"zero"`` to write what is not finite as zeros. A NaN in a written frame otherwise
            reaches every later pass that sees it and, once it is fused, the sink of its stream for good. No host read.
        device: default torch's.

    The arguments can be read under their names.

    Attributes:
        k: keys ``[L, B, (S + W) * T, H_kv, D]`` in ``dtype``, slots ``[sinks | ring]``, rotated. Its address
            never changes.
        v: values, as k.
        sink_k: un-rotated keys of the sinks ``[L, B, S * T, H_kv, D]`` in ``sink_dtype``, those of a static sink in
            ``dtype`` (a view of k where k holds them). None for a static sink at absolute positions, which needs none.
        sink_v: values of the sinks, as sink_k, never None.
        num_frames: int64 ``[B]`` on the device: frames so far, the open ones included. Do not write to it.
        open_frames: F of the open chunk, 0 before the first.
        full: every stream has filled its window.
        ages: frames so far of every stream, ``num_frames`` as the host knows it.

    Raises:
        ValueError, TypeError: an argument out of range, or a rope that does not fit head_dim or frame_tokens.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        batch_size: int,
        num_kv_heads: int,
        head_dim: int,
        frame_tokens: int,
        sink_frames: int,
        window_frames: int,
        alpha: float | Sequence[float] | torch.Tensor = 0.999,
        rope: Rope3D | None = None,
        sink_positions: str = "before_window",
        dtype: torch.dtype = torch.bfloat16,
        sink_dtype: torch.dtype | None = None,
        nonfinite: str = "keep",
        device: torch.device | str | None = None,
    ):
        self.num_layers = checks.integer("num_layers", num_layers, 1)
        self.batch_size = checks.integer("batch_size", batch_size, 1)
        self.num_kv_heads = checks.integer("num_kv_heads", num_kv_heads, 1)
        self.head_dim = checks.integer("head_dim", head_dim, 1)
        self.frame_tokens = checks.integer("frame_tokens", frame_tokens, 1)
        self.sink_frames = checks.integer("sink_frames", sink_frames, 0)
        self.window_frames = checks.integer("window_frames", window_frames, 1)
        if dtype not in checks.FLOATING:
            raise TypeError(f"dtype must be one of {checks.FLOATING}, got {dtype}")
        if sink_positions not in ("before_window", "absolute"):
            raise ValueError(f'sink_positions must be "before_window" or "absolute", got {sink_positions!r}')
        if nonfinite not in ("keep", "zero"):
            raise ValueError(f'nonfinite must be "keep" or "zero", got {nonfinite!r}')
        checks.rope(rope, self.head_dim, self.frame_tokens)
        self.alpha, self._alphas = alpha, checks.alphas(alpha, self.num_kv_heads)
        self.rope, self.sink_positions, self.dtype, self.nonfinite = rope, sink_positions, dtype, nonfinite
        self.sink_dtype = checks.accumulator(dtype, sink_dtype)
        self.device = torch.empty(0, device=device).device  # "cuda" -> "cuda:0"
        self._geometry = CacheGeometry(self.sink_frames, self.window_frames, self.frame_tokens)
        with torch.inference_mode(False):  # its tensors outlive the call: they must not be inference tensors
            self._allocate()
        self._layers = [CacheLayer(self, index) for index in range(self.num_layers)]
        self._set_ages([0] * self.batch_size)
        self.open_frames = 0
        self._written, self._warned = True, False  # the open chunk, by a layer at least; about one that was not
        self._forget_contexts()

    def _allocate(self) -> None:
        static = all(alpha == 1.0 for alpha in self._alphas)
        tokens = self.frame_tokens

        def zeros(frames: int, dtype: torch.dtype) -> torch.Tensor:
            # In memory head by head, so that a head's valid keys are one contiguous run: up to 12 % faster attention.
            size = (self.num_layers, self.batch_size, self.num_kv_heads, frames * tokens, self.head_dim)
            return torch.zeros(size, dtype=dtype, device=self.device).transpose(2, 3)

        self.k, self.v = (zeros(self._geometry.capacity, self.dtype) for _ in range(2))
        # Values need an accumulator only in another precision; keys also where the cache holds them rotated. A static
        # sink is never averaged: un-rotated keys serve to move it along with the window, in the cache's precision.
        own_dtype = self.dtype if static else self.sink_dtype
        has_sink = self.sink_frames > 0
        own_v = has_sink and own_dtype != self.dtype
        own_k = own_v or (has_sink and self.rope is not None and not (static and self.sink_positions == "absolute"))
        self._tensors = CacheTensors(
            self.k,
            self.v,
            zeros(self.sink_frames, own_dtype) if own_k else None,
            zeros(self.sink_frames, own_dtype) if own_v else None,
        )
        self.num_frames = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        addresses.fixed(*self._tensors, self.num_frames)
        self._decay = None
        if not static:
            alpha = torch.tensor(self._alphas, dtype=torch.float64)
            precision = accumulate_dtype(self.dtype)
            self._decay = torch.stack([alpha, 1 - alpha]).to(self.device, precision)
        self._rope_tables: RopeTables | None = None
        if self.rope is not None:
            self._rope_tables = self.rope.tables(self.device, self.dtype, tokens)

    @classmethod
    def from_wan_config(cls, local_attn_size: int = 9, sink_size: int = 3, **config: Any) -> EMASinkCache:
        """A cache from the names of a Wan / Reward-Forcing config; defaults are the published 1.3B model at 832 x 480.

        ``window_frames = local_attn_size - sink_size``. ``config`` takes num_layers (30), batch_size (1), dim (1536),
        num_heads (12), latent_height (60), latent_width (104), patch_size (1, 2, 2), dtype (bfloat16), sink_dtype
        (``"published"``: the cache's dtype; None: float32), and alpha, sink_positions, nonfinite and device of
        `EMASinkCache`.

        Raises:
            ValueError, TypeError: naming the argument.
        """
        return cls(**wan_config.cache_arguments(local_attn_size, sink_size, **config))

    # --- streaming ----------------------------------------------------------------------------------------------------

    def begin_chunk(
        self, frames: int, reopen: int = 0, samples: Iterable[int] | None = None, backend: str | None = None
    ) -> None:
        """Opens the newest ``frames`` frames: ``reopen`` existing ones, opened again, and the rest new.

        Frames that leave the window because of the new ones are fused into the sink here, once, oldest first.

        Args:
            frames: F in 1..W, up to S + W while nothing has been evicted; may change from call to call.
            reopen: 0..min(frames, frames so far). ``begin_chunk(F, reopen=F)`` reopens the newest F, e.g. to
                recompute the window under another prompt.
            samples: host indices of the streams that advance (default: all). The others reopen their newest F frames;
                one that has fewer writes nothing for the missing ones, and gets zeros for their queries.
            backend: for this call; default as in `use_backend`.

        Raises:
            ValueError, TypeError, IndexError: naming the argument; the cache is then unchanged.
        """
        chosen = checks.samples(samples, self.batch_size)
        frames = checks.integer("frames", frames, 1, self._geometry.capacity)
        seen = min((self.ages[b] for b in chosen), default=frames)
        reopen = checks.integer("reopen", reopen, 0)
        if reopen > min(frames, seen):
            raise ValueError(f"reopen must be at most min(frames={frames}, frames so far={seen}), got {reopen}")
        new = frames - reopen
        ages = [age + new if b in chosen else age for b, age in enumerate(self.ages)]
        if frames > self.window_frames and max(ages) > self._geometry.capacity:
            raise ValueError(
                f"frames must be in 1..{self.window_frames} once frames are evicted (up to "
                f"{self._geometry.capacity} while all fit), got {frames}"
            )
        self._notice_unwritten(reopen)
        advancing = None
        if len(chosen) < self.batch_size:  # filled on the device: a copy from the host would wait for the stream
            advancing = torch.zeros(self.batch_size, dtype=torch.bool, device=self.device)
            for sample in chosen:
                advancing[sample].fill_(True)
        evicted, added = self._geometry.evicted_frames, new if advancing is None else advancing * new
        prepared = self._preparing(frames, lambda: self.num_frames + added, backend)
        with torch.no_grad():
            if any(evicted(ages[b]) > evicted(self.ages[b]) for b in chosen):
                choice = backends.choose("begin_chunk", self.device, self.dtype, self.head_dim, backend)
                request = BeginChunk(
                    self._tensors, self.num_frames, new, advancing, self._decay, self._rope_tables, self._geometry,
                    self.sink_positions == "before_window",
                )  # fmt: skip
                ops.begin_chunk(request, choice.backend)
            self.num_frames += added
        self._opened(ages, frames, prepared)

    def _notice_unwritten(self, reopen: int) -> None:
        """Warns, once, where a chunk ends that no layer has written: `begin_chunk` is likely called once a pass."""
        if not (self._written or self._warned or reopen):
            self._warned = True
            warnings.warn(
                f"begin_chunk closes a chunk of {self.open_frames} frames that no layer has written. It is called once "
                "a chunk, before the first pass, not once a pass: each call evicts frames and fuses them into the sink",
                stacklevel=3,
            )
        self._written = False

    def _set_ages(self, ages: list[int]) -> None:
        self.ages = ages
        self.full = min(ages) >= self._geometry.capacity

    def _require_chunk(self) -> None:
        if self.open_frames == 0:
            raise ValueError("no chunk is open: call begin_chunk(frames) first")

    def _check_chunk(self, **tensors: torch.Tensor) -> None:
        """Raises unless a chunk is open and q, k, v are its tokens."""
        self._require_chunk()
        sizes = (self.batch_size, self.open_frames * self.frame_tokens, self.num_kv_heads, self.head_dim)
        checks.chunk(sizes, self.device, tensors)

    def _preparing(
        self, frames: int, after: Callable[[], torch.Tensor], backend: str | None = None
    ) -> list[Callable[[], None]]:
        """For a chunk of ``frames`` that opens when num_frames becomes ``after()``: what to call once it has."""
        if frames == 0 or torch.compiler.is_compiling():
            return []
        kind = self.device, self.dtype, self.head_dim
        with torch.no_grad():
            return backends.prepare_chunk(
                kind, backend, self.num_frames, after, frames, self._rope_tables, self._geometry
            )

    def _opened(self, ages: list[int], frames: int, prepared: list[Callable[[], None]]) -> None:
        """After every change of the lengths: what was made of the old ones is out of date."""
        self.open_frames = frames
        self._set_ages(ages)
        self._forget_contexts()
        for commit in prepared:
            commit()

    def _forget_contexts(self) -> None:
        self._contexts: dict[int, Context] = {}  # of the open chunk, by layer
        self._frozen_num_frames: torch.Tensor | None = None

    def _context(self, layer: int) -> Context:
        self._require_chunk()
        if layer not in self._contexts:
            if self._frozen_num_frames is None:
                with torch.inference_mode(False):
                    self._frozen_num_frames = self.num_frames.clone()
            with torch.inference_mode(False):
                self._contexts[layer] = freeze(
                    self.k[layer], self.v[layer], self._frozen_num_frames, self.full, self._geometry,
                    self._rope_tables, self.open_frames,
                )  # fmt: skip
        return self._contexts[layer]

    def __getitem__(self, index: int) -> CacheLayer:
        if not isinstance(index, int) or isinstance(index, bool):
            raise TypeError(f"a cache is indexed by layer, an integer, got {index!r}")
        if not -self.num_layers <= index < self.num_layers:
            raise IndexError(f"layer must be in 0..{self.num_layers - 1}, got {index}")
        if torch.compiler.is_compiling():
            # Traced views must come from the one buffer: as inputs of their own they would alias, and be copied.
            return CacheLayer(self, index % self.num_layers)
        return self._layers[index]

    def __iter__(self) -> Iterator[CacheLayer]:
        return (self[index] for index in range(self.num_layers))

    def __len__(self) -> int:
        return self.num_layers

    # --- state --------------------------------------------------------------------------------------------------------

    @property
    def sink_k(self) -> torch.Tensor | None:
        """Un-rotated keys of the sinks, ``[L, B, S * T, H_kv, D]``; None for a static sink at absolute positions."""
        own = self._tensors.sink_k
        return own if own is not None or self.rope is not None else self._sinks_of(self.k)

    @property
    def sink_v(self) -> torch.Tensor:
        """Values of the sinks, ``[L, B, S * T, H_kv, D]``."""
        own = self._tensors.sink_v
        return self._sinks_of(self.v) if own is None else own

    def _sinks_of(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :, : self.sink_frames * self.frame_tokens]

    def _state_tensors(self) -> dict[str, torch.Tensor]:
        own = {
            "k": self.k,
            "v": self.v,
            "sink_k": self._tensors.sink_k,
            "sink_v": self._tensors.sink_v,
        }
        return {name: x for name, x in (own | {"num_frames": self.num_frames}).items() if x is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of the cache's tensors, accumulators included."""
        return sum(x.numel() * x.element_size() for x in self._state_tensors().values())

    def reset(self, samples: Iterable[int] | None = None) -> None:
        """Forgets everything, or only the given streams (host indices); addresses stay.

        Raises:
            ValueError, TypeError, IndexError: ``samples`` that are not streams of the batch.
        """
        chosen = checks.samples(samples, self.batch_size)

        def cleared(num_frames: torch.Tensor) -> torch.Tensor:
            for sample in chosen:
                num_frames[sample].zero_()
            return num_frames

        frames = 0 if len(chosen) == self.batch_size else self.open_frames
        with torch.no_grad():  # what no frame of the new streams has reached is never read
            prepared = self._preparing(frames, lambda: cleared(self.num_frames.clone()))
            cleared(self.num_frames)
        self._written = True
        self._opened([0 if b in chosen else age for b, age in enumerate(self.ages)], frames, prepared)

    def state_dict(self) -> dict[str, Any]:
        """The tensors (not copied, as in a torch module), the host's state and the geometry they belong to."""
        return self._state_tensors() | {
            "ages": list(self.ages),
            "open_frames": self.open_frames,
            "geometry": self._description(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies a `state_dict` into this cache, whose geometry must be the same; addresses stay.

        Raises:
            ValueError: a missing or unexpected entry, another geometry, shape or dtype. Nothing is changed then.
        """
        own = self._state_tensors()
        ages, frames = cache_state.checked(state, own, self._description(), self._geometry.capacity)
        prepared = self._preparing(frames, lambda: state["num_frames"].to(self.device))
        with torch.no_grad():
            for name, x in own.items():
                x.copy_(state[name])
        self._written = True
        self._opened(ages, frames, prepared)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and copy make a cache anew: layers stay views of its tensors. Contexts are left behind."""
        return _rebuilt, (self._arguments() | {"device": str(self.device)}, self.snapshot())

    def snapshot(self) -> dict[str, Any]:
        """A copy of the whole state, for `restore`: the tensors on their device, and the host's numbers."""
        return {k: x.clone() if isinstance(x, torch.Tensor) else x for k, x in self.state_dict().items()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Goes back to a `snapshot`, bit for bit; errors as in `load_state_dict`."""
        self.load_state_dict(snapshot)

    def to(self, device: torch.device | str) -> EMASinkCache:
        """This cache, or, for another device, a new one there with the same contents."""
        device = torch.empty(0, device=device).device
        if device == self.device:
            return self
        other = EMASinkCache(**self._arguments(), device=device)
        other.load_state_dict(self.state_dict())
        return other

    def _arguments(self) -> dict[str, Any]:
        return dict(
            num_layers=self.num_layers,
            batch_size=self.batch_size,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            frame_tokens=self.frame_tokens,
            sink_frames=self.sink_frames,
            window_frames=self.window_frames,
            alpha=self.alpha,
            rope=self.rope,
            sink_positions=self.sink_positions,
            dtype=self.dtype,
            sink_dtype=self.sink_dtype,
            nonfinite=self.nonfinite,
        )

    def _description(self) -> dict[str, Any]:
        """The arguments as plain values, so that a saved state loads with weights_only."""
        plain = self._arguments() | {"dtype": str(self.dtype), "sink_dtype": str(self.sink_dtype)}
        plain["alpha"] = list(self._alphas)
        plain["rope"] = None if self.rope is None else repr(self.rope)
        plain["frequencies"] = None if self.rope is None else [f.tolist() for f in self.rope.frequencies]
        return plain

    def __repr__(self) -> str:
        return (
            f"EMASinkCache({self.num_layers} layers, batch {self.batch_size}, {self.num_kv_heads} x {self.head_dim}, "
            f"{self.sink_frames} sink + {self.window_frames} window frames of {self.frame_tokens} tokens, "
            f"{self.dtype}, {self.device}, {self.nbytes / 2**20:.1f} MiB)"
        )


def _rebuilt(arguments: dict[str, Any], state: dict[str, Any]) -> EMASinkCache:
    cache = EMASinkCache(**arguments)
    cache.load_state_dict(state)
    return cache
