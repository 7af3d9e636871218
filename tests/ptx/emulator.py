"""Executes PTX on CPU tensors. Builds the emulator (tests/ptx/src) where its sources have changed; see README.md."""

import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

SOURCES = Path(__file__).parent / "src"
BUILD = Path(__file__).parents[2] / "build" / f"ptx_emulator-{sys.implementation.cache_tag}"  # of one Python
# No contraction to fma: PTX says where a product is rounded. Two's complement, and rounding modes that change.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fwrapv", "-ffp-contract=off", "-frounding-math", "-fvisibility=hidden"]
FLAGS += ["-ftree-vectorize", "-fvect-cost-model=dynamic"]  # for the loops of the tensor cores


class PTXError(Exception):
    """What the emulator objects to: ``kind``, ``line`` of the PTX, ``source`` ("file.cu:12"), ``tensor``."""

    def __init__(self, kind: str, message: str, line: int = 0, source: str = "", tensor: str = ""):
        where = f" [PTX line {line}" + (f", {source}]" if source else "]") if line else ""
        super().__init__(f"{kind}: {message}{where}")
        self.kind, self.line, self.source, self.tensor = kind, line, source, tensor


@dataclass
class Result:
    """Counts of one launch. ``instructions`` has a row for each PTX instruction, in order."""

    instructions: list
    global_load_bytes: int
    global_store_bytes: int
    global_load_sectors: int
    global_store_sectors: int
    shared_wavefronts: int
    shared_ideal_wavefronts: int
    tensor_operations: int
    unwritten: dict = field(default_factory=dict)  # bytes of poisoned tensors that nobody wrote

    @property
    def bank_conflicts(self) -> int:
        return self.shared_wavefronts - self.shared_ideal_wavefronts

    def by_class(self) -> dict:
        """Executed warp instructions by class (tensor, float, integer, special, shared, global, ...)."""
        counts = Counter()
        for row in self.instructions:
            counts[row[1]] += row[4]
        return dict(counts)

    def by_opcode(self) -> dict:
        counts = Counter()
        for row in self.instructions:
            counts[row[0]] += row[4]
        return dict(counts)

    def basic_blocks(self) -> list:
        """Dictionaries: label, first and last PTX line, how many instructions, how often executed (in warps)."""
        blocks, fresh = [], True
        for _name, _category, line, _source, executed, _lanes, conflicts, opcode, label in self.instructions:
            if fresh or label:
                blocks.append(
                    {"label": label, "first_line": line, "instructions": 0, "executed": executed, "bank_conflicts": 0}
                )
            block = blocks[-1]
            block["last_line"] = line
            block["instructions"] += 1
            block["bank_conflicts"] += conflicts
            fresh = opcode in ("bra", "ret", "exit")
        return blocks


def _compiler() -> str | None:
    return next(
        (found for name in (os.environ.get("CXX"), "g++", "c++", "clang++") if name and (found := shutil.which(name))),
        None,
    )


def unavailable() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if not _compiler():
        return "no C++ compiler for the PTX emulator"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is missing, which binds the PTX emulator"
    return None


def _run(command: list) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"building the PTX emulator failed: {' '.join(map(str, command))}\n{done.stderr[:4000]}")


@cache
def build():
    """The extension module, compiled if a source is newer than its object; once, though tests run in processes."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "lock"):
        module = _compile()
    spec = importlib.util.spec_from_file_location("ptx_emulator", module)
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension


def _compile() -> Path:
    import pybind11

    headers = max(path.stat().st_mtime for path in SOURCES.glob("*.h"))
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    jobs, objects = [], []
    for source in sorted(SOURCES.glob("*.cpp")):
        target = BUILD / f"{source.stem}.o"
        objects.append(target)
        if not target.exists() or target.stat().st_mtime < max(source.stat().st_mtime, headers):
            jobs.append([_compiler(), *FLAGS, *includes, "-c", source, "-o", target])
    # The slowest first: two processes then end at about the same time.
    jobs.sort(key=lambda job: job[-3].stem not in ("bindings", "parser", "decode"))
    module = BUILD / f"ptx_emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_run, jobs))
    if jobs or not module.exists():
        _run([_compiler(), "-shared", *objects, "-o", module])
    return module


class _Memory:
    """Storages of the tensors of a launch, with a state byte for each of their bytes (memory.h)."""

    def __init__(self):
        self.storages = {}  # address: (name, bytes, state, granule)
        self.names = []
        self.poisoned = []

    def add(self, name: str, tensor: torch.Tensor, poisoned: bool) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"tensor '{name}' is not on the CPU")
        storage = tensor.untyped_storage()
        base, size, item = storage.data_ptr(), storage.nbytes(), tensor.element_size()
        if base not in self.storages:
            # numpy's zeros, unlike torch's, take memory only where they are touched.
            self.storages[base] = [name, size, torch.from_numpy(np.zeros(size, np.uint8)), item]
        entry = self.storages[base]
        entry[3] = min(entry[3], item)
        if tensor.numel() == 0:
            return
        # Only the elements of the view may be touched, not what lies between them.
        sizes, strides = (*tensor.shape, item), (*(s * item for s in tensor.stride()), 1)
        view = entry[2].as_strided(sizes, strides, tensor.storage_offset() * item)
        view.fill_(2 if poisoned else 1)
        span = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * item + item
        self.names.append((name, tensor.data_ptr(), tensor.data_ptr() + span))
        if poisoned:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -1 if tensor.dtype.is_signed else 255)
            self.poisoned.append((name, view))

    def regions(self) -> list:
        return [(name, base, size, state.data_ptr(), item) for base, (name, size, state, item) in self.storages.items()]


class Module:
    """PTX text, parsed. ``launch`` runs one of its entries."""

    def __init__(self, text: str):
        self._extension = build()
        try:
            self._module = self._extension.Module(text)
        except self._extension.Error as error:
            raise PTXError(**error.args[0]) from None
        self.entries = self._module.entries()

    def launch(
        self,
        entry: str,
        grid,
        block,
        args,
        shared_bytes: int = 0,
        seed: int = 0,
        *,
        poison=(),
        tensors: dict | None = None,
        check_lanes: bool = True,
        serialised_accumulators: bool = False,
        step_limit: int = 2_000_000_000,
    ) -> Result:
        """Runs ``entry`` on tensors in place; raises PTXError at the first thing the checker objects to.

        args: a list, or a dict whose keys name the tensors in messages; tensors (their address is passed), ints,
            floats, or bytes for a struct passed by value. Missing trailing parameters are null pointers (Triton has
            two extra ones).
        poison: names (or positions) of tensors whose contents count as never written; they are filled with NaN.
        tensors: further tensors that the kernel may touch, by name: those that a struct points to.
        check_lanes: report hazards between lanes of one warp too, not only between warps.
        serialised_accumulators: allow reading wgmma's accumulators before the wait (ptxas then serialises the wgmma).
        """
        if not isinstance(args, dict):
            args = {i: value for i, value in enumerate(args)}
        memory = _Memory()
        for name, value in [*args.items(), *(tensors or {}).items()]:
            if isinstance(value, torch.Tensor):
                memory.add(str(name), value, name in poison)
        unknown = set(poison) - {*args, *(tensors or {})}
        if unknown:
            raise ValueError(f"no such tensor to poison: {unknown}")
        if entry not in self.entries:
            raise PTXError("launch", f"the module has no entry '{entry}'")
        info = self._module.describe(entry)
        grid, block = (tuple(x) + (1,) * (3 - len(x)) for x in (grid, block))
        self._check_block(entry, block, info)
        answer = self._module.launch(
            entry,
            grid,
            block,
            _pack(entry, info, list(args.values())),
            shared_bytes,
            seed,
            step_limit,
            check_lanes,
            serialised_accumulators,
            memory.regions(),
            memory.names,
        )
        if "error" in answer:
            raise PTXError(**answer["error"])
        unwritten = {name: int((view == 2).sum()) for name, view in memory.poisoned}
        return Result(**answer, unwritten=unwritten)

    @staticmethod
    def _check_block(entry: str, block: tuple, info: dict) -> None:
        required, most = info["required_threads"], info["max_threads"]
        if required[0] and required != block:
            raise PTXError("launch", f"{entry} requires blocks of {required} threads, not {block}")
        count = block[0] * block[1] * block[2]
        if count > 1024 or (most[0] and count > most[0] * most[1] * most[2]):
            raise PTXError("launch", f"{entry} cannot run with {count} threads in a block")


def _pack(entry: str, info: dict, args: list) -> bytes:
    parameters = info["parameters"]
    if len(args) > len(parameters):
        raise PTXError("launch", f"{entry} has {len(parameters)} parameters, {len(args)} arguments given")
    packed = bytearray(info["parameter_bytes"])
    for (name, offset, size), value in zip(parameters, args, strict=False):
        if isinstance(value, torch.Tensor):
            data = struct.pack("<Q", value.data_ptr())
        elif isinstance(value, float):
            data = struct.pack({2: "<e", 4: "<f", 8: "<d"}[size], value)
        elif isinstance(value, (bool, int)):
            data = (int(value) & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        else:
            data = bytes(value)
        if len(data) != size:
            raise PTXError("launch", f"parameter {name} of {entry} has {size} bytes, its argument {len(data)}")
        packed[offset : offset + size] = data
    return bytes(packed)
