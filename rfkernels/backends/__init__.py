"""Which backend serves a call: one table, and the choice made from it.

A backend is a module with the functions of `reference`: each operation as a function of one request, and two predicates
that return a reason or None, ``unavailable(device)`` and ``unsupported(operation, dtype, head_dim)``. A new one is a
folder and a row of ``_MODULES``. The public functions choose once and pass the name into the op, so that a backward
pass, which may run in another thread and outside the context manager, uses the same one.

``library`` is of another kind: it has a name for each kernel of other packages, and serves streaming passes only. What
else is asked of it is done as by `auto`.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from .. import native
from . import cuda, library, reference, sdpa, triton

_NATIVE = "compiled CPU loops" if native.missing is None else f"no compiled CPU loops: {native.missing}"
_MODULES: dict[str, Any] = {"reference": reference, "sdpa": sdpa, "triton": triton, "cuda": cuda, **library.BACKENDS}
_NOTES = {
    "reference": "plain PyTorch, any device; the definition, slow",
    "sdpa": f"torch's scaled_dot_product_attention, any device; on the CPU {_NATIVE}",
    "triton": "Triton kernels, on CUDA devices (interpreted on a CPU, for tests)",
    "cuda": f"CUDA C++ kernels, built for {native.cuda_architectures}",
}


class UnservedError(ValueError):
    """A backend was named that does not run on the device, or does not serve the operation, dtype or head size."""


def module(name: str) -> Any:
    """The module of a backend, by the name that an op carries.

    Raises:
        ValueError: an unknown name.
    """
    if name not in _MODULES:
        raise ValueError(f"backend must be one of {sorted(_MODULES)}, got {name!r}")
    return _MODULES[name]


# --- auto -------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A candidate; kernels: only where the backend's forward kernels are of this generation."""

    backend: str
    kernels: str | None = None


_CACHE = ("begin_chunk", "write", "redmd_loss")
_FORWARD = ("streaming_attention", "chunk_attention", "sink_window_attention")
_BACKWARD = ("chunk_attention_backward", "sink_window_attention_backward")
OPERATIONS = (*_CACHE, *_FORWARD, *_BACKWARD)

_ANY = (Row("sdpa"), Row("reference"))
_COMPILED_FIRST = (Row("cuda"), Row("triton"), *_ANY)
_TRITON_FIRST = (Row("triton"), Row("cuda"), *_ANY)


def _orders(forward: tuple[Row, ...], backward: tuple[Row, ...], cache: tuple[Row, ...]) -> dict[str, tuple[Row, ...]]:
    kinds = ((_CACHE, cache), (_FORWARD, forward), (_BACKWARD, backward))
    return {operation: order for operations, order in kinds for operation in operations}


# The first that serves wins: by kind of device and family of architecture (`family`), then by operation. On the CPU the
# order is measured (benchmarks/README.md); elsewhere it follows from what the kernels are made of: for 9.x ours have
# wgmma forward (if built for 9.0a) and Triton's have it both ways; for 10.x only Triton's use its tensor cores fully.
# A library's kernel that knows lengths becomes a row of streaming_attention, by its own name, when a committed
# measurement says that it should: none does.
_AUTO: dict[str, dict[str, tuple[Row, ...]]] = {
    "cpu": _orders(_ANY, _ANY, _ANY),
    "cuda 8.x": _orders(_COMPILED_FIRST, _COMPILED_FIRST, _COMPILED_FIRST),
    "cuda 9.x": _orders((Row("cuda", "wgmma"), *_TRITON_FIRST), _TRITON_FIRST, _COMPILED_FIRST),
    "cuda 10.x": _orders(_TRITON_FIRST, _TRITON_FIRST, _COMPILED_FIRST),
    "cuda 11.x": _orders(_TRITON_FIRST, _TRITON_FIRST, _COMPILED_FIRST),
    "cuda 12.x": _orders(_COMPILED_FIRST, _COMPILED_FIRST, _COMPILED_FIRST),
}
_ELSEWHERE = _orders(_TRITON_FIRST, _TRITON_FIRST, _TRITON_FIRST)
_MEASURED = ("cpu",)


def family(device: torch.device) -> str:
    """The row of the table for a device: its kind, and for NVIDIA GPUs the major version of their architecture."""
    if device.type == "cuda" and torch.version.cuda and torch.cuda.is_available():
        return f"cuda {torch.cuda.get_device_capability(device)[0]}.x"
    return device.type


class Choice(NamedTuple):
    """The backend of a call, and whether it wants to know from the host that the window is full."""

    backend: str
    reads_full: bool


class _Block:
    """One `use_backend` block."""

    def __init__(self, name: str | None):
        self.name = name


class _Thread(threading.local):
    """The open blocks of a thread, the innermost last. What they say is in `_named`, which torch.compile guards."""

    blocks: tuple[_Block, ...] = ()


_thread = _Thread()
_named = threading.local()  # .backend; dynamo guards a plain local's attribute by thread, but not a subclass's
_named.backend = None  # of this thread; looking for what is absent, as in others, costs a microsecond
_choices: dict[tuple[str, torch.device, torch.dtype, int | None, str | None], Choice] = {}  # every choice that was made


def choose(
    operation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, backend: str | None = None
) -> Choice:
    """The backend for one call: ``backend``, else the one of the innermost `use_backend`, else by `auto`.

    A named backend never falls back; a library, which only knows streaming passes, leaves the rest to `auto`.

    Args:
        operation: one of ``OPERATIONS``. head_dim: None for the loss, which has no heads.

    Raises:
        ValueError: an unknown name; UnservedError, a ValueError: a named backend that does not serve the call.
    """
    if head_dim is not None:
        head_dim = operator.index(head_dim)  # a symbol in a trace with dynamic shapes: kernels are made for one size
    return _choose(operation, device, dtype, head_dim, backend or getattr(_named, "backend", None))


def _choose(
    operation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None, named: str | None
) -> Choice:
    key = (operation, device, dtype, head_dim, named)
    if key not in _choices:
        if named is None or named == "auto" or _is_ours(named, operation):
            named = _first(operation, device, dtype, head_dim)
        elif (reason := refusal(named, operation, device, dtype, head_dim)) is not None:
            raise UnservedError(f"backend {named!r} cannot do this: {reason}")
        elif named == library.NAME and head_dim is not None:
            named = library.first(device, dtype, head_dim)
        reads_full = getattr(module(named), "reads_full", None)
        _choices[key] = Choice(named, reads_full is not None and reads_full(device))
    return _choices[key]


# What torch.compiler.assume_constant_result sets, which imports the compiler: predicates look at the device and at
# Triton's settings, which cannot be traced. Their arguments are constants of the trace, or guarded.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_ours(name: str, operation: str) -> bool:
    """Whether the named backend is a library, which leaves the operation to our kernels."""
    return name in library.BACKENDS and operation != "streaming_attention"


def prepare_chunk(
    cache_kind: tuple[torch.device, torch.dtype, int], backend: str | None, *chunk: Any
) -> list[Callable[[], None]]:
    """Tells the backends with a ``prepare_chunk`` that a chunk is about to open, and whether its passes are theirs.

    chunk: num_frames, what it will be, frames, rope tables and geometry. Returns what to call once the chunk is open.
    """
    try:
        chosen = choose("streaming_attention", *cache_kind, backend).backend
    except ValueError:  # the name is judged where it is used; one may be for begin_chunk alone
        chosen = ""
    prepares = ((name, getattr(candidate, "prepare_chunk", None)) for name, candidate in _MODULES.items())
    commits = [prepare(*chunk, chosen=name == chosen) for name, prepare in prepares if prepare is not None]
    return [commit for commit in commits if commit is not None]


def refusal(name: str, operation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why the backend does not serve the operation on tensors like these, or None.

    Raises:
        ValueError: an unknown name.
    """
    backend = module(name)
    if name in library.BACKENDS:
        return backend.refusal(operation, device, dtype, head_dim)
    return backend.unavailable(device) or backend.unsupported(operation, dtype, head_dim)


def _order(operation: str, device: torch.device) -> tuple[Row, ...]:
    return _AUTO.get(family(device), _ELSEWHERE)[operation]


def _first(operation: str, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str:
    for name, kernels in _order(operation, device):
        serves = refusal(name, operation, device, dtype, head_dim) is None
        if serves and (kernels is None or module(name).forward_kernels(device) == kernels):
            return name
    raise ValueError(f"no backend runs on {device}")


# --- what users ask ---------------------------------------------------------------------------------------------------


def available_backends(device: torch.device | str | None = None) -> list[str]:
    """Names of the backends that work on ``device`` (default: cuda where there is one, else cpu).

    Raises:
        RuntimeError: torch's own, for a ``device`` that is none.
    """
    device = _default_device(device)
    return [name for name, backend in _MODULES.items() if backend.unavailable(device) is None]


def explain_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """For each backend, and for ``auto``, a line that says what it is here, or why it does not work here.

    Args:
        device: default cuda where there is one, else cpu.

    Returns:
        a dict from names to lines: ``"available: ..."`` or ``"not available: ..."``; for ``auto`` what it takes.

    Raises:
        RuntimeError: torch's own, for a ``device`` that is none.
    """
    device = _default_device(device)
    rows = {}
    for name, backend in _MODULES.items():
        reason = backend.unavailable(device)
        note = backend.note(device) if name in library.BACKENDS else _NOTES[name]
        rows[name] = f"available: {note}" if reason is None else f"not available: {reason}"
    chosen: dict[str, list[str]] = {}
    for operation in OPERATIONS:
        head_dim = None if operation == "redmd_loss" else 128
        chosen.setdefault(_first(operation, device, torch.bfloat16, head_dim), []).append(operation)
    served = " and ".join(
        name if len(chosen) == 1 else f"{name} for {', '.join(operations)}" for name, operations in chosen.items()
    )
    measured = "" if family(device) in _MEASURED else " (not measured)"
    rows["auto"] = f"on {family(device)}: {served}{measured}"
    return rows


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every rfkernels op of this thread uses the backend ``name`` ("auto": the default choice).

    ``"library"`` attends in streaming passes by the best dense attention of another package that is installed,
    ``"library:flash_attn_3"`` by that one; what libraries do not do is done as by "auto".

    Blocks may nest and, in generators, overlap: the one that was opened last and is still open decides. Other threads
    are not affected. Ops remember their backend for the backward pass, wherever that runs.

    Raises:
        ValueError: an unknown name, or a backend that works on no device here.
    """
    if name != "auto" and name not in _MODULES:
        raise ValueError(f'backend must be "auto" or one of {sorted(_MODULES)}, got {name!r}')
    if name != "auto" and (reason := module(name).unavailable(_default_device(None))) is not None:
        raise ValueError(f"backend {name!r} is not available: {reason}")
    block = _Block(name)
    _set_blocks((*_thread.blocks, block))
    try:
        yield
    finally:
        _set_blocks(tuple(other for other in _thread.blocks if other is not block))


def _set_blocks(blocks: tuple[_Block, ...]) -> None:
    _thread.blocks = blocks
    _named.backend = blocks[-1].name if blocks else None


def _default_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
