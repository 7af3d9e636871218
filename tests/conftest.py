"""One fixture decides where tests run: on a GPU where there is one, else on the CPU."""

import pytest
import torch

import rfkernels as rf

torch.set_num_threads(1)  # small operations: threads would mostly wait for each other on a busy machine


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=rf.available_backends())
def backend(request):
    """Every backend that works here; the test runs within ``use_backend``."""
    with rf.use_backend(request.param):
        yield request.param
