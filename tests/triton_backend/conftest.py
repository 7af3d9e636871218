"""These tests run where Triton's kernels do: on a GPU, or, started by ``test_triton.py``, in Triton's interpreter."""

import pytest

from rfkernels.backends import triton


@pytest.fixture(autouse=True)
def _runs_here(device, poisoned_outputs):
    reason = triton.unavailable(device)
    if reason is not None:
        pytest.skip(f"test_triton.py runs these in a process of their own; here: {reason}")
