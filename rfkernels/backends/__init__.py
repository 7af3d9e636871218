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
from . import cuda, reference, sdpa, triton


def _serves_all(dtype: torch.dtype, head_dim: int | None) -> str | None:
    return None


@dataclass(frozen=True)
class Backend:
    """module: its functions. note: what explain_backends adds.

    why_not: why it cannot run on a device, or None. refuses: why it does not serve a dtype and head_dim, or None.
    yields: why auto, where Triton runs too, takes Triton, or None.
    """

    module: ModuleType
    why_not: Callable[[torch.device], str | None]
    note: str
    refuses: Callable[[torch.dtype, int | None], str | None] = _serves_all
    yields: Callable[[torch.device], str | None] = lambda device: None


_NATIVE = "compiled CPU loops" if native.missing is None else f"no compiled CPU loops: {native.missing}"

_TABLE: dict[str, Backend] = {
    "reference": Backend(reference, lambda device: None, "plain PyTorch, any device; the definition, slow"),
    "sdpa": Backend(
        sdpa, lambda device: None, f"torch's scaled_dot_product_attention, any device; on the CPU {_NATIVE}"
    ),
    "triton": Backend(
        triton, triton.why_not, "Triton kernels, on CUDA devices (interpreted on a CPU, for tests)", triton.refuses
    ),
    "cuda": Backend(
        cuda, cuda.why_not, f"CUDA C++ kernels, built for {native.cuda_architectures}", cuda.refuses, cuda.yields
    ),
}

# First that can run wins, by type of device. Measured on a CPU only (benchmarks/README.md).
_AUTO: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "sdpa", "reference")}
_AUTO_ELSEWHERE: tuple[str, ...] = ("sdpa", "reference")

_chosen: str | None = None  # a plain global: torch.compile guards it


def get(name: str) -> ModuleType:
    """The module of a backend, by the name that an op carries."""
    if name not in _TABLE:
        raise ValueError(f"backend must be one of {sorted(_TABLE)}, got {name!r}")
    return _TABLE[name].module


def resolve(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    """The backend for tensors like these: the named one (which never falls back), else the first of `auto`.

    Raises:
        ValueError: the named backend does not run on the device, or does not serve the dtype or head_dim.
    """
    if _chosen is None:
        return _first(device, dtype, head_dim)
    reason = _TABLE[_chosen].why_not(device) or _TABLE[_chosen].refuses(dtype, head_dim)
    if reason is not None:
        raise ValueError(f"backend {_chosen!r} cannot do this: {reason}")
    return _chosen


def _first(device: torch.device, dtype: torch.dtype, head_dim: int | None = None) -> str:
    serving = [
        name
        for name in _AUTO.get(device.type, _AUTO_ELSEWHERE)
        if _TABLE[name].why_not(device) is None and _TABLE[name].refuses(dtype, head_dim) is None
    ]
    if not serving:
        raise ValueError(f"no backend runs on {device}")
    first = serving[0]
    if first == "cuda" and "triton" in serving and _TABLE[first].yields(device) is not None:
        return "triton"
    return first


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
    yielding = _TABLE["cuda"].why_not(device) is None and _TABLE["cuda"].yields(device)
    if yielding:
        rows["cuda"] += f"; auto takes Triton first where it runs: {yielding}"
    measured = "" if device.type == "cpu" else " (order not measured)"
    rows["auto"] = f"on {device.type}: {_first(device, torch.bfloat16)}{measured}"
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
        raise ValueError(f"backend {name!r} is {explain_backends()[name]}")  # "not available: " and why
    previous, _chosen = _chosen, None if name == "auto" else name
    try:
        yield
    finally:
        _chosen = previous


def _default_device(device: torch.device | str | None) -> torch.device:
    return torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
