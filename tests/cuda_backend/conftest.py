"""One fixture decides: the CUDA backend runs on a GPU where there is one, else on CPU tensors in the PTX emulator."""

from dataclasses import replace

import pytest

from rfkernels import backends, native
from rfkernels.backends import cuda


@pytest.fixture(autouse=True)
def emulated(device, monkeypatch):
    """The module `emulated`, or None on a GPU. Within the test ``rf.use_backend("cuda")`` works."""
    if device.type == "cuda":
        if reason := cuda.why_not(device):
            pytest.skip(reason)
        yield None
        return
    from cuda_backend import emulated

    if reason := emulated.unavailable():
        pytest.skip(reason)
    monkeypatch.setattr(cuda, "_ops", emulated.load())
    monkeypatch.setattr(native, "cuda_head_dims", (64, 80, 96, 128, 256))
    row = backends._TABLE["cuda"]
    monkeypatch.setitem(backends._TABLE, "cuda", replace(row, why_not=lambda device: None))
    emulated.launches.clear()
    yield emulated
