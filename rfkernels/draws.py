"""Random numbers of a batch, from one generator or from one for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw(
    function: Callable[..., torch.Tensor],
    size: Sequence[int],
    generator: Generators,
    device: torch.device | str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``function`` (torch.randn, torch.rand) of ``size`` ``[B, ...]``, drawn where the generator lives, in float32 at
    least.

    generator: a sequence has one for each sample, so that a sample's numbers do not depend on the batch it is in.

    Raises:
        ValueError: another number of generators than samples.
    """
    precision = torch.promote_types(dtype, torch.float32)
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return function(size, generator=generator, device=where, dtype=precision).to(device, dtype)
    if len(generator) != size[0]:
        raise ValueError(f"generator must be one, or one for each of {size[0]} samples, got {len(generator)}")
    samples = [function(size[1:], generator=g, device=g.device, dtype=precision) for g in generator]
    return torch.stack(samples).to(device, dtype)


def keyed_generator(*key: int) -> torch.Generator:
    """A generator on the CPU whose numbers depend on ``key``, integers >= 0, alone."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed))
