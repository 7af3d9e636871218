"""What `device.Module` does around a launch, with a driver that copies memory; the driver's own calls need a GPU."""

import ctypes

import pytest
import torch

from cuda.device import Module


class Parameter(ctypes.Structure):
    _fields_ = [("source", ctypes.c_void_p), ("count", ctypes.c_int64), ("target", ctypes.c_void_p)]


class CopyingDriver:
    """Its only kernel copies ``count`` floats."""

    def load(self, text):
        return text

    def launch(self, module, entry, grid, block, shared_bytes, parameter):
        self.called = (module, entry, grid, block, shared_bytes)
        given = Parameter.from_buffer_copy(parameter)
        self.addresses = given.source, given.target
        ctypes.memmove(given.target, given.source, 4 * given.count)


@pytest.mark.parametrize("count, left", [(6, 0), (4, 2)])
def test_a_launch_works_on_copies_of_storages(count, left):
    driver = CopyingDriver()
    source, target = torch.arange(10.0)[2:8], torch.zeros(9)[1:7]
    parameter = Parameter(source.data_ptr(), count, target.data_ptr())
    result = Module("ptx", driver, "cpu").launch(
        "copy", (3,), (32,), [bytes(parameter)], 64, tensors={"source": source, "target": target}, poison=["target"]
    )
    assert driver.called == ("ptx", "copy", (3, 1, 1), (32, 1, 1), 64)
    assert not {source.data_ptr(), target.data_ptr()} & set(driver.addresses), "the kernel gets addresses of copies"
    assert torch.equal(target[:count], source[:count]) and torch.equal(source, torch.arange(2.0, 8.0))
    assert result.unwritten == {"target": 4 * left} and result.instructions == []
