"""The names that ops are registered under. They follow from the package's own, so that two copies of it, under two
names, can be loaded into one process (the one that is installed, and the one that hub/ makes)."""

from __future__ import annotations

from typing import Any

import torch

PUBLIC = __name__.partition(".")[0]  # torch.ops.rfkernels
NATIVE = f"{PUBLIC}_native"  # compiled code for the CPU and for CUDA; the same names in csrc/host
CUDA = f"{PUBLIC}_cuda"  # private to the cuda backend

public: Any = getattr(torch.ops, PUBLIC)
native: Any = getattr(torch.ops, NATIVE)
cuda: Any = getattr(torch.ops, CUDA)
