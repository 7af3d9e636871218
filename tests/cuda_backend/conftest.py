"""One fixture decides: the CUDA backend runs on a GPU where there is one, else on CPU tensors in the PTX emulator."""

import pytest

from rfkernels.backends import cuda


@pytest.fixture(autouse=True)
def emulated(device, poisoned_outputs):
    """The module `emulated`, or None on a GPU. Within the test ``rf.use_backend("cuda")`` works."""
    if device.type == "cuda":
        if reason := cuda.unavailable(device):
            pytest.skip(reason)
        yield None
        return
    from cuda_backend import emulated

    if reason := emulated.unavailable():
        pytest.skip(reason)
    with emulated.on_emulator():
        yield emulated
