"""One fixture decides: the CUDA backend runs on a GPU where there is one, else on CPU tensors in the PTX emulator."""

import patched
import pytest

from rfkernels import native
from rfkernels.backends import cuda
from rfkernels.backends.cuda import compiled


@pytest.fixture(autouse=True)
def emulated(device, monkeypatch):
    """The module `emulated`, or None on a GPU. Within the test ``rf.use_backend("cuda")`` works."""
    if device.type == "cuda":
        if reason := cuda.unavailable(device):
            pytest.skip(reason)
        yield None
        return
    from cuda_backend import emulated

    if reason := emulated.unavailable():
        pytest.skip(reason)
    for namespace in ("native", "private"):
        monkeypatch.setattr(compiled, namespace, emulated.load())
    monkeypatch.setattr(native, "cuda_head_dims", (64, 80, 96, 128, 256))
    emulated.launches.clear()
    with patched.serving("cuda"):
        yield emulated
