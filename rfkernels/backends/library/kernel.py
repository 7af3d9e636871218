"""What an adapter says of the dense attention kernel of another package, and how that is found."""

from __future__ import annotations

import abc
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)


def installed(package: str, part: str | None = None) -> bool:
    """Whether an import would find the package, and a file of it; nothing is imported for that.

    A package may be spread over several folders: flash-attn 2 and 4 are both ``flash_attn``.
    """
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # in sys.modules without a spec
        return False
    if spec is None or part is None:
        return spec is not None
    folders = [*(spec.submodule_search_locations or ()), *(str(Path(path) / package) for path in sys.path)]
    return any((Path(folder) / part).exists() for folder in folders)


def taking(function: Callable[..., Any], *parameters: str) -> Callable[..., Any]:
    """The function of a package, if its version has the parameters.

    Raises:
        TypeError: it has not.
    """
    lacks = [name for name in parameters if name not in inspect.signature(function).parameters]
    if lacks:
        raise TypeError(f"{function.__name__} takes no {' and no '.join(lacks)}: another version is needed")
    return function


class Kernel(abc.ABC):
    """A dense attention kernel that attends to a prefix of each stream's keys.

    Attributes:
        name: in ``use_backend("library:<name>")``. about: what it is.
        pip: what to install. generations: of NVIDIA GPUs it runs on, major versions of their compute capability.
        dtypes, head_dims: that it serves without copying the cache.
        quantises: its results leave the error budget; only taken by its own name.
    """

    name: str
    about: str
    pip: str
    generations: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...] = HALF
    head_dims: range = range(8, 257, 8)
    quantises = False

    @abc.abstractmethod
    def not_found(self) -> str | None:
        """Why an import would not find the kernel, or None. Nothing is imported."""

    @abc.abstractmethod
    def load(self) -> Callable[..., Any]:
        """The package's function; raises where it is not the one that is meant."""

    @abc.abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, return_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """q ``[B, N_q, H_q, D]`` over the first ``lengths`` of k, v ``[B, N_k, H_kv, D]``, all of one dtype.

        lengths: int32 ``[B]`` on their device, None for all; never given where `takes_lengths` says no. q: rows that
        begin at multiples of 16 bytes. k, v: strided as the cache is, head by head in memory. scale > 0.

        Returns:
            out like q, and the natural-log normaliser float32 ``[B, H_q, N_q]`` where it was asked for.
        """

    def takes_lengths(self, device: torch.device) -> bool:
        """Whether lengths stay on the device: then one call, and one CUDA graph, serves streams of any age."""
        return True

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        return self.load()

    @functools.cached_property
    def fault(self) -> str | None:
        """Why the package that is installed cannot be used, or None. Imports it."""
        try:
            self.function  # noqa: B018
        except Exception as error:  # whatever a package built for another torch, CUDA or Python raises
            return f"{self.pip} is installed, but fails: {type(error).__name__}: {error}"
        return None

    def unavailable(self, device: torch.device) -> str | None:
        """Why it does not run on the device, or None."""
        if (reason := self.not_found()) is not None:
            return reason
        if device.type != "cuda" or not torch.version.cuda:
            return f"{self.about} is for NVIDIA GPUs, not {'ROCm' if torch.version.hip else device.type}"
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        if (major := torch.cuda.get_device_capability(device)[0]) not in self.generations:
            known = ", ".join(f"{generation}.x" for generation in self.generations)
            return f"{self.about} is for compute capability {known}, not {major}.x"
        return self.fault

    def refusal(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """Why it does not serve a pass over a cache of that dtype and head_dim there, or None."""
        if (reason := self.unavailable(device)) is not None:
            return reason
        if dtype not in self.dtypes:
            served = " and ".join(str(served).removeprefix("torch.") for served in self.dtypes)
            return f"{self.about} serves {served}, got {dtype}"
        head_dims = self.head_dims_on(device)
        if head_dim not in head_dims:
            step, most = head_dims.step, head_dims[-1]
            return f"{self.about} serves a head_dim that is a multiple of {step} up to {most} there, got {head_dim}"
        return None

    def head_dims_on(self, device: torch.device) -> range:
        return self.head_dims
