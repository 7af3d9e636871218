"""These tests run where Triton's kernels do: on a GPU, or, started by ``test_triton.py``, in Triton's interpreter."""

import pytest
import torch

from rfkernels.backends import triton


@pytest.fixture(autouse=True)
def _runs_here(device):
    reason = triton.unavailable(device)
    if reason is not None:
        pytest.skip(f"test_triton.py runs these in a process of their own; here: {reason}")


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Memory that torch.empty gives holds NaN: what a kernel should have written and did not is no lucky zero."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
