"""No compiled kernels: a kernel of the Hub has Triton's alone. In the package this module loads them."""

import torch

missing = "this kernel of the Hub has Triton kernels alone: the compiled ones are in the package rfkernels"
cuda_architectures = ""


def serves(x: torch.Tensor) -> bool:
    return False
