"""Builds the compiled part with CMake where that is possible, and says what is left out where it is not."""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
OLDEST_SETUPTOOLS = 77  # pyproject.toml's licence is of that form
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:  # pip looks after that, but with --no-build-isolation
    sys.exit(
        f"rfkernels: setuptools {setuptools.__version__} is too old to build it. Either `pip install .` without "
        f"--no-build-isolation, or first: pip install -U 'setuptools>={OLDEST_SETUPTOOLS}' cmake ninja"
    )
from setuptools.command.bdist_wheel import bdist_wheel  # noqa: E402 (not in older ones)


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
    if shutil.which(tool("cmake")) is None:
        return "cmake was not found (pip install cmake ninja; `pip install .` without --no-build-isolation brings it)"
    return None


def nvcc_release(nvcc):
    """The major version of an nvcc; "" where it does not say, which CMakeLists.txt then reports."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", said)
    return found[1] if found else ""


def choose_nvcc(version, cuda):
    """(nvcc, "") or (None, why there will be no CUDA kernels) for a torch of that version, built with that CUDA.

    What is asked for by name (CUDA_HOME, TORCH_CUDA_ARCH_LIST) is not left out: if it cannot be, the build stops.
    """
    nvcc = toolchain.find_nvcc()
    if nvcc is None:
        return None, "no nvcc was found in CUDA_HOME, on PATH or in the environment's nvidia packages"
    named = bool(os.environ.get("CUDA_HOME"))
    if not cuda and not named and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return None, f"torch {version} has no CUDA (TORCH_CUDA_ARCH_LIST or CUDA_HOME asks for them all the same)"
    major = nvcc_release(nvcc)
    if cuda and not named and major and major != cuda.split(".")[0]:
        return None, f"nvcc is of CUDA {major} ({nvcc}), torch {version} of CUDA {cuda} (CUDA_HOME names another nvcc)"
    return nvcc, ""


def settings():
    """What CMakeLists.txt is asked to build, and for what."""
    folder, version = find_torch()
    cuda = torch_cuda(folder)
    nvcc, reason = choose_nvcc(version, cuda)
    return {
        "RF_TORCH_DIR": folder,
        "RF_TORCH_VERSION": version,
        "RF_TORCH_CUDA": cuda,
        "RF_TORCH_TARGET": toolchain.oldest_torch(),
        "RF_TORCH_TARGET_CODE": toolchain.torch_target(),
        "RF_NVCC": nvcc or "",
        "RF_CUDA_REASON": reason,
        "RF_CUDA_ARCHITECTURES": listed("TORCH_CUDA_ARCH_LIST"),
        "RF_CUDA_HEAD_DIMS": listed("RFKERNELS_HEAD_DIMS"),
    }


def generator():
    return "Ninja" if shutil.which(tool("ninja")) else "Unix Makefiles"


def build_folder(chosen):
    """One folder for each choice of settings, kept: what has not changed is not compiled again."""
    choice = ROOT, find_compiler(), generator(), *chosen.values()
    digest = hashlib.sha256("\n".join(map(str, choice)).encode())
    return ROOT / "build" / f"cmake-{digest.hexdigest()[:8]}"


class CMakeBuild(build_ext):
    """One library, without a line of Python in it: its name is no extension module's, and it serves every Python."""

    def get_ext_filename(self, fullname):
        return fullname.replace(".", "/") + (".dll" if sys.platform == "win32" else ".so")

    def copy_extensions_to_source(self):  # in-place and editable builds
        for ext in self.extensions:
            built, library = (Path(base) / self.get_ext_filename(ext.name) for base in (self.build_lib, ROOT))
            # Renamed into place: a process that has the old file loaded keeps it.
            fresh = shutil.copy2(built, library.with_name(library.name + ".new"))
            os.replace(fresh, library)

    def build_extension(self, ext):
        chosen = settings()
        build, target = build_folder(chosen), Path(self.build_lib) / self.get_ext_filename(ext.name)
        build.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        tools = {"CMAKE_BUILD_TYPE": "Release"}
        if generator() == "Ninja":
            tools["CMAKE_MAKE_PROGRAM"] = tool("ninja")  # of an isolated build it lies elsewhere each time
        defines = [f"-D{name}={value}" for name, value in (chosen | tools).items()]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.check_call([tool("cmake"), "-G", generator(), "-S", str(ROOT), "-B", str(build), *defines])
        subprocess.check_call([tool("cmake"), "--build", str(build), "--parallel", jobs])
        shutil.copy2(build / target.name, target)


class Wheel(bdist_wheel):
    """Of a platform, if something was compiled; of any Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


reason = why_python_only()
if reason:
    print(f"rfkernels: Python-only build: {reason}", file=sys.stderr)
setup(
    packages=find_packages(include=["rfkernels*"]),
    ext_modules=[] if reason else [Extension("rfkernels.rfkernels_kernels", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
