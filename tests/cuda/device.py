"""Runs PTX on a GPU by the call with which `ptx.emulator.Module` runs it on CPU tensors.

The tensors of a launch are copied to the GPU, whole storages with what lies between the elements of a view, the
addresses in the kernel's parameter are replaced, and afterwards the contents are copied back.
"""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import torch

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
UNWRITTEN = 0xFF  # in every byte: a NaN that no instruction makes


class Driver:
    """The four calls of the CUDA driver that load and launch a kernel, on torch's context and current stream."""

    def __init__(self) -> None:
        torch.zeros(1, device="cuda")  # makes the context current
        self._library = ctypes.CDLL("libcuda.so.1")

    def _call(self, name: str, *arguments) -> None:
        if code := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name}: CUDA error {code}")

    def load(self, text: str) -> ctypes.c_void_p:
        module = ctypes.c_void_p()
        self._call("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(text.encode()))
        return module

    def launch(self, module, entry: str, grid: tuple, block: tuple, shared_bytes: int, parameter: bytes) -> None:
        function, size = ctypes.c_void_p(), ctypes.c_uint(shared_bytes)
        self._call("cuModuleGetFunction", ctypes.byref(function), module, ctypes.c_char_p(entry.encode()))
        if shared_bytes > 48 << 10:
            self._call("cuFuncSetAttribute", function, ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES), size)
        value = ctypes.create_string_buffer(parameter, len(parameter))
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(value))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        sizes = map(ctypes.c_uint, (*grid, *block))
        self._call("cuLaunchKernel", function, *sizes, size, stream, parameters, None)
        torch.cuda.synchronize()


class Module:
    def __init__(self, text: str, driver=None, device: str = "cuda"):
        self._driver, self._device = driver or Driver(), device
        self._module = self._driver.load(text)

    def launch(self, entry: str, grid, block, args, shared_bytes: int = 0, seed: int = 0, *, tensors: dict, poison=()):
        """args: one struct, as bytes. The result has the emulator's ``unwritten`` and counts no instructions."""
        (parameter,) = args
        storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors.values()}
        for name in poison:
            as_bytes(tensors[name].untyped_storage()).fill_(UNWRITTEN)
        copies = {base: as_bytes(storage).to(self._device, copy=True) for base, storage in storages.items()}
        words = bytearray(parameter)
        for offset in range(0, len(words) - 7, 8):
            (word,) = struct.unpack_from("<Q", words, offset)
            for base, storage in storages.items():
                if base <= word < base + storage.nbytes():
                    struct.pack_into("<Q", words, offset, word - base + copies[base].data_ptr())
        grid, block = (tuple(x) + (1,) * (3 - len(x)) for x in (grid, block))
        self._driver.launch(self._module, entry, grid, block, shared_bytes, bytes(words))
        for base, storage in storages.items():
            as_bytes(storage).copy_(copies[base])
        unwritten = {name: int(untouched(tensors[name]).sum()) * tensors[name].element_size() for name in poison}
        return SimpleNamespace(unwritten=unwritten, instructions=[])


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(storage)


def untouched(x: torch.Tensor) -> torch.Tensor:
    """Which elements hold the bytes that were there before the launch."""
    return (x.contiguous().unsqueeze(-1).view(torch.uint8) == UNWRITTEN).all(-1)
