"""What tests change inside the package, in one place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from rfkernels import backends
from rfkernels.models import wan


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
