"""These tests run where Triton's kernels do: on a GPU, or, started by ``test_triton.py``, in Triton's interpreter."""

import pytest

from rfkernels.backends import triton


@pytest.fixture(autouse=True)
def _runs_here(device):
    why_not = triton.why_not(device)
    if why_not is not None:
        pytest.skip(f"test_triton.py runs these in a process of their own; here: {why_not}")
