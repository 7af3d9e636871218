"""The backends in one table, and the choice between them.

A backend is a module with the functions of `reference` below; a new one is a module and a row. The public functions
resolve the backend once and pass its name into the op, so that a backward pass, which may run in another thread and
outside the context manager, uses the same one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

import torch

from .. import native
from . import reference, sdpa, triton


@dataclass(frozen=True)
class Backend:
    """module: its functions. why_not: why it cannot run on a device, or None. note: what explain_backends adds."""

    module: ModuleType
    why_not: Callable[[torch.device], str | None]
    note: str


_NATIVE = "compiled CPU loops" if native.missing is None else f"no compiled CPU loops: {native.missing}"

_TABLE: dict[str, Backend] = {
    "reference": Backend(reference, lambda device: None, "plain PyTorch, any device; the definition, slow"),
    "sdpa": Backend(
        sdpa, lambda device: None, f"torch's scaled_dot_product_attention, any device; on the CPU {_NATIVE}"
    ),
    "triton": Backend(triton, triton.why_not, "Triton kernels, on CUDA devices (interpreted on a CPU, for tests)"),
}

# First that can run wins, by type of device. Measured on a CPU only (benchmarks/README.md).
_AUTO: dict[str, tuple[str, ...]] = {"cuda": ("triton", "sdpa", "reference")}
_AUTO_ELSEWHERE: tuple[str, ...] = ("sdpa", "reference")

_chosen: str | None = None  # a plain global: torch.compile guards it


def get(name: str) -> ModuleType:
    """The module of a backend, by the name that an op carries."""
    if name not in _TABLE:
        raise ValueError(f"backend must be one of {sorted(_TABLE)}, got {name!r}")
    return _TABLE[name].module


def resolve(device: torch.device) -> str:
    """The backend for tensors on ``device``: the named one (which never falls back), else the first of `auto`."""
    if _chosen is not None:
        why_not = _TABLE[_chosen].why_not(device)
        if why_not is not None:
            raise ValueError(f"backend {_chosen!r} does not run on {device}: {why_not}")
        return _chosen
    return _first(device)


def _first(device: torch.device) -> str:
    order = _AUTO.get(device.type, _AUTO_ELSEWHERE)
    return next(name for name in order if _TABLE[name].why_not(device) is None)


def available_backends(device: torch.device | str | None = None) -> list[str]:
    """Names of the backends that work on ``device`` (default: cuda where there is one, else cpu)."""
    device = _default_device(device)
    return [name for name, backend in _TABLE.items() if backend.why_not(device) is None]


def explain_backends(device: torch.device | str | None = None) -> dict[str, str]:
    """For each backend, and for ``auto``, what it is here or why it does not work here."""
    device = _default_device(device)
    rows = {}
    for name, backend in _TABLE.items():
        why_not = backend.why_not(device)
        rows[name] = f"available: {backend.note}" if why_not is None else f"not available: {why_not}"
    measured = "" if device.type == "cpu" else " (order not measured)"
    rows["auto"] = f"on {device.type}: {_first(device)}{measured}"
    return rows


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block every rfkernels op uses the backend ``name`` ("auto": the default choice).

    Process-wide, like torch's own backend switches. Ops remember their backend for the backward pass.

    Raises:
        ValueError: an unknown name, or a backend that works on no device here.
    """
    global _chosen
    if name != "auto" and name not in _TABLE:
        raise ValueError(f'backend must be "auto" or one of {sorted(_TABLE)}, got {name!r}')
    if name != "auto" and name not in available_backends():
        raise ValueError(f"backend {name!r} is not available: {explain_backends()[name]}")
    previous, _chosen = _chosen, None if name == "auto" else name
    try:
        yield
    finally:
        _chosen = previous


def _default_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
