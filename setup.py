"""Builds the compiled part with CMake and ninja where that is possible, and says what is left out where it is not."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_toolchain():
    """rfkernels/toolchain.py by itself: importing the package would import torch, which a build may not see."""
    spec = importlib.util.spec_from_file_location("rfkernels_toolchain", ROOT / "rfkernels" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = load_toolchain()


def torch_cuda(folder):
    """The CUDA version that the torch in ``folder`` was built with; "" for none."""
    scope = {}
    exec((folder / "version.py").read_text(), scope)
    return scope.get("cuda") or ""


def find_torch():
    """(folder, version) of the torch that the package will run with, or None."""
    for folder in toolchain.site_packages():
        version_file = folder / "torch" / "version.py"
        if version_file.is_file():
            scope = {}
            exec(version_file.read_text(), scope)
            return folder / "torch", scope["__version__"]
    return None


def listed(variable):
    """An environment variable whose entries are separated by spaces, commas or semicolons, as a list for CMake."""
    return ";".join(re.split(r"[\s,;]+", os.environ.get(variable, "").strip()))


def find_compiler():
    return os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++", "cl"))), None)


def tool(name):
    """cmake or ninja: on PATH, or beside an interpreter whose environment is not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts")) or name


def why_python_only():
    """The reason why nothing can be compiled here, or None."""
    torch = find_torch()
    if torch is None:
        return "torch is not installed in this environment (install it first; the kernels link to it)"
    if tuple(int(part) for part in torch[1].split("+")[0].split(".")[:2]) < toolchain.OLDEST_TORCH:
        return f"torch {torch[1]} is older than {toolchain.oldest_torch()}, whose stable ABI the kernels need"
    if find_compiler() is None:
        return "no C++ compiler was found (set CXX, or install g++ or clang++)"
    return None


def settings():
    """What CMakeLists.txt is asked to build, and for what."""
    folder, version = find_torch()
    return {
        "RF_TORCH_DIR": folder,
        "RF_TORCH_VERSION": version,
        "RF_TORCH_CUDA": torch_cuda(folder),
        "RF_TORCH_TARGET": toolchain.oldest_torch(),
        "RF_TORCH_TARGET_CODE": toolchain.torch_target(),
        "RF_NVCC": toolchain.find_nvcc() or "",
        "RF_CUDA_ARCHITECTURES": listed("TORCH_CUDA_ARCH_LIST"),
        "RF_CUDA_HEAD_DIMS": listed("RFKERNELS_HEAD_DIMS"),
    }


def build_folder(chosen):
    """One folder for each choice of settings, kept: what has not changed is not compiled again."""
    choice = ROOT, find_compiler(), sys.prefix, sys.implementation.cache_tag, *chosen.values()
    digest = hashlib.sha256("\n".join(map(str, choice)).encode())
    return ROOT / "build" / f"cmake-{digest.hexdigest()[:8]}"


class CMakeBuild(build_ext):
    def copy_extensions_to_source(self):  # in-place and editable builds
        super().copy_extensions_to_source()
        for library in (Path(self.build_lib) / "rfkernels").glob("rfkernels_kernels.*"):
            # Renamed into place: a process that has the old file loaded keeps it.
            fresh = shutil.copy2(library, ROOT / "rfkernels" / (library.name + ".new"))
            os.replace(fresh, ROOT / "rfkernels" / library.name)

    def build_extension(self, ext):
        chosen = settings()
        build, target = build_folder(chosen), Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        pybind11 = subprocess.check_output([sys.executable, "-m", "pybind11", "--cmakedir"], text=True)
        tools = {  # of an isolated build they lie elsewhere each time
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": tool("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.strip(),
        }
        defines = [f"-D{name}={value}" for name, value in (chosen | tools).items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call([tool("cmake"), "-G", "Ninja", "-S", str(ROOT), "-B", str(build), *defines])
        subprocess.check_call([tool("cmake"), "--build", str(build), "--parallel", jobs])
        for library in (*build.glob("rfkernels_kernels.*"), *build.glob("_C.*")):
            if library.suffix in (".so", ".pyd", ".dylib"):
                shutil.copy2(library, target)


reason = why_python_only()
if reason:
    print(f"rfkernels: Python-only build: {reason}", file=sys.stderr)
setup(
    # A wheel carries within the package: benchmarks/, for python -m rfkernels bench (its modules import relatively),
    # and csrc/, the sources of what is compiled in it.
    packages=[*find_packages(include=["rfkernels*"]), "rfkernels.benchmarks", "rfkernels.csrc"],
    package_dir={"rfkernels.benchmarks": "benchmarks", "rfkernels.csrc": "csrc"},
    ext_modules=[] if reason else [Extension("rfkernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
