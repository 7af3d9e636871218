"""Stands where the package has its CUDA C++ kernels; never chosen."""

import torch

from .. import native


def unavailable(device: torch.device) -> str:
    return native.missing
