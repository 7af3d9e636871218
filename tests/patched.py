"""What tests change inside the package, and which backends they run, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import rfkernels as rf
from rfkernels import backends
from rfkernels.backends import library
from rfkernels.models import wan


def exact_backends() -> list[str]:
    """Those that work here: of the libraries each kernel by its name, but for those that quantise."""
    left_out = {library.NAME} | {f"{library.NAME}:{kernel.name}" for kernel in library.KERNELS if kernel.quantises}
    return [name for name in rf.available_backends() if name not in left_out]


def own_backends() -> list[str]:
    """Those that work here and serve every operation themselves."""
    return [name for name in rf.available_backends() if name not in library.BACKENDS]


@contextlib.contextmanager
def serving(*names: str) -> Iterator[None]:
    """The named backends are available on every device, as far as the choice between backends knows."""
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(backends.module(name), "unavailable", lambda device: None))
        stack.enter_context(mock.patch.object(backends, "_choices", {}))
        yield


@contextlib.contextmanager
def sinusoids(embedding: Callable[[torch.Tensor, int], torch.Tensor]) -> Iterator[None]:
    """`CausalWan` embeds timesteps ``[...]`` as ``embedding(timesteps, size)`` ``[..., size]`` does."""
    with mock.patch.object(wan, "_sinusoids", embedding):
        yield
