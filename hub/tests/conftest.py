import os
from pathlib import Path

import kernels
import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels_ci: the tests that a build of the kernel runs")


@pytest.fixture(scope="session")
def rf():
    return kernels.get_local_kernel(Path(__file__).parents[1])


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _triton(rf, device):
    """Triton's kernels where they can run: on a GPU, or on a CPU in the interpreter (TRITON_INTERPRET=1)."""
    torch.manual_seed(0)
    runs = device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    with rf.use_backend("triton" if runs else "auto"):
        yield
