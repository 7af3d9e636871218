"""The wheel: made by the same setup.py, CMake and ninja as `make wheel`, installed in a fresh environment, used from
another folder.

The default run makes it in the folder that this session's build was made in, so that nothing is compiled, and for the
architectures and head sizes of that build; with ``-m slow`` it is compiled too, from a source distribution. The fresh
environment finds torch in the running one's site-packages: another torch is the subject of check_installs.sh.
"""

import base64
import csv
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import defaultdict
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

import pytest

import rfkernels as rf
from rfkernels import native

ROOT = Path(__file__).parents[1]


def run(*command, cwd: Path, **environment: str) -> str:
    """stdout; the environment is the running one without what points Python at other packages."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# --- making it --------------------------------------------------------------------------------------------------------


def kept_build(setup_py) -> dict[str, str]:
    """The environment variables that this session's compiled part was built with; skips where its folder is gone."""
    if native.missing is not None:
        pytest.skip(native.missing)
    from rfkernels import _C

    (loaded,) = Path(native.__file__).parent.glob("rfkernels_kernels.*")
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    variables = {"TORCH_CUDA_ARCH_LIST": _C.cuda_architectures, "RFKERNELS_HEAD_DIMS": _C.cuda_head_dims}
    for environment in (variables, dict.fromkeys(variables, "")):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            library = setup_py.build_folder(setup_py.settings()) / loaded.name
        if library.exists() and library.read_bytes() == loaded.read_bytes():
            if library.stat().st_mtime < max(path.stat().st_mtime for path in sources):
                pytest.skip("csrc/ is newer than its build: install again (or -m slow, which compiles)")
            return environment
    pytest.skip("the build that this session's library comes from is not kept under build/ (-m slow compiles one)")


@pytest.fixture(scope="module")
def source_distribution(setup_py, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, "sdist", "-d", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module", params=["kept build", pytest.param("compiled", marks=pytest.mark.slow)])
def wheel(request, setup_py, tmp_path_factory) -> Path:
    installed = {distribution.name for distribution in distributions()}
    if (
        missing := {"pip", "wheel", "pybind11"} - installed
    ):  # looked up, for importing pip swaps distutils under setuptools
        pytest.skip(f"{', '.join(sorted(missing))} needed to make a wheel")
    if not all(shutil.which(setup_py.tool(name)) for name in ("cmake", "ninja")):
        pytest.skip("cmake and ninja are needed to make a wheel")
    folder = tmp_path_factory.mktemp("wheel")
    if request.param == "kept build":
        environment = kept_build(setup_py)
        bases = ["egg_info", "-e", folder, "build", "-b", folder / "build"]  # nothing of it in the source tree
        made = ["bdist_wheel", "-b", folder / "bdist", "-d", folder]
        run(sys.executable, "setup.py", "-q", *bases, *made, cwd=ROOT, **environment)
    else:
        with tarfile.open(request.getfixturevalue("source_distribution")) as packed:
            packed.extractall(folder / "source", filter="data")
        (source,) = (folder / "source").iterdir()
        command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, source]
        run(*command, cwd=folder, TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX", RFKERNELS_HEAD_DIMS="64")
    (found,) = folder.glob("*.whl")
    return found


# --- what it holds ----------------------------------------------------------------------------------------------------


def files_under(*folders: str) -> set[str]:
    """Files of the tree, but for what a build or Python leaves there."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()]
    return {path.relative_to(ROOT).as_posix() for path in paths if path.suffix not in (".so", ".pyc", ".new")}


def test_a_source_distribution_holds_what_builds_and_tests_need(source_distribution):
    with tarfile.open(source_distribution) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    single = {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE", "cmake/glibc.cmake"}
    missing = (single | files_under("csrc", "rfkernels", "benchmarks", "tests", "docs")) - names
    assert not missing


def test_it_holds_the_package_its_sources_and_its_licence(wheel):
    """Every file of the tree that belongs in it, the compiled part, and nothing else."""
    expected = files_under("rfkernels") | {f"rfkernels/{name}" for name in files_under("csrc", "benchmarks")}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        compiled = {name for name in names if name.endswith(".so")}
        assert names - compiled == expected
        assert sorted(re.sub(r"\..*", "", name) for name in compiled) == ["rfkernels/_C", "rfkernels/rfkernels_kernels"]
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
        assert metadata["Name"] == "rfkernels" and any(x.startswith("torch") for x in metadata.get_all("Requires-Dist"))
        for name, digest, _ in csv.reader(archive.read(f"{info}/RECORD").decode().splitlines()):
            if digest:
                found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).decode().rstrip("=")
                assert digest == f"sha256={found}", name
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    assert f"-{tag}-{tag}-" in wheel.name, "the pybind11 module is of one Python version"


# --- installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory) -> Path:
    """The interpreter of an environment with rfkernels from the wheel, and the running one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Folders named in a .pth file have their own .pth files, as those of editable installs, left alone.
    (packages / "shared.pth").write_text("\n".join(shared))
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", wheel]
    run(sys.executable, "-m", "pip", "--python", python, *install, cwd=folder)
    return python


@pytest.fixture(scope="module")
def info(python, tmp_path_factory) -> dict[str, str]:
    """What ``python -m rfkernels info`` says in another folder."""
    said = run(python, "-m", "rfkernels", "info", cwd=tmp_path_factory.mktemp("elsewhere"))
    return dict(re.findall(r"^ *(\S(?:.*\S)?)  +(\S.*)$", said, re.M))


@pytest.fixture(scope="module")
def architectures(info) -> list[str]:
    """["8.0", "9.0+PTX"] and the like; empty for a CPU wheel."""
    found = re.search(r", for (.*), attention with", info["CUDA kernels"])
    return found[1].split(", ") if found else []


def test_info_from_another_folder(info):
    assert info["rfkernels"] == rf.__version__
    assert info["compiled kernels"].startswith("CPU, by "), info
    assert info["CUDA kernels"].startswith(("CUDA ", "none: no nvcc was found")), info
    assert info["auto"].startswith("on "), info


def test_it_works_from_another_folder(python, architectures, tmp_path):
    script = shutil.copy(ROOT / "tests" / "installed.py", tmp_path)
    said = run(python, script, "compiled CPU loops", *(["cuda"] if architectures else []), cwd=tmp_path)
    assert "reference and sdpa agree" in said


# --- the library in it ------------------------------------------------------------------------------------------------


def library_of(python: Path) -> Path:
    (library,) = python.parents[1].glob("lib/python*/site-packages/rfkernels/rfkernels_kernels.*")
    return library


def test_one_file_serves_every_torch_from_the_oldest_on(python, tmp_path):
    """It asks for torch's stable ABI only, and for no library of CUDA: one file loads with and without."""
    if not (shutil.which("readelf") and shutil.which("nm")):
        pytest.skip("readelf and nm (binutils) are needed")
    library = library_of(python)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", library, cwd=tmp_path))
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2"}
    system |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}  # of older C libraries
    assert set(needed) - system == {"libtorch_cpu.so", "libc10.so"}
    wanted = [row.split()[-1] for row in run("nm", "-DC", "--undefined-only", library, cwd=tmp_path).splitlines()]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert not [name for name in wanted if name.startswith(("at::", "c10::", "torch::", "cuda", "cu"))]


def cuobjdump() -> str:
    spec = importlib.util.find_spec("triton")
    found = [] if spec is None else list(Path(spec.origin).parent.rglob("cuobjdump"))
    if not (found or shutil.which("cuobjdump")):
        pytest.skip("no cuobjdump (it comes with Triton and with a CUDA toolkit)")
    return str(found[0]) if found else "cuobjdump"


def embedded(library: Path, folder: Path) -> dict[str, set[str]]:
    """For "sm_80" and the like the kernels in machine code, for "compute_90" and the like those in PTX."""
    kernels = defaultdict(list)
    symbols = run(cuobjdump(), "-symbols", library, cwd=folder)
    for part in re.split(r"^Fatbin elf code:", symbols, flags=re.M)[1:]:
        kernels[re.search(r"^arch = (\w+)", part, re.M)[1]] += re.findall(r"STO_ENTRY\s+(\w+)", part)
    run(cuobjdump(), "-xptx", "all", library, cwd=folder)
    for file in folder.glob("*.ptx"):
        target = re.search(r"\.sm_(\w+)\.ptx$", file.name)[1]
        kernels[f"compute_{target}"] += re.findall(r"\.entry (\w+)\(", file.read_text())
    assert all(len(set(names)) == len(names) for names in kernels.values()), "a kernel lies in it twice"
    return {target: set(names) for target, names in kernels.items()}


def portable(kernels: dict[str, set[str]]) -> set[str]:
    """What every GPU must get: kernels that are not of an architecture of their own, as sm_90a is."""
    return set().union(*(names for target, names in kernels.items() if target[-1].isdigit()))


def test_every_architecture_has_every_kernel(python, architectures, tmp_path):
    """Machine code of every architecture that was asked for, and PTX of those with +PTX."""
    if not architectures:
        pytest.skip("a wheel for the CPU only")
    kernels = embedded(library_of(python), tmp_path)
    every = portable(kernels)
    assert {"rf_begin_chunk", "rf_write", "rf_redmd_grad", "rf_attention_forward_bf16_d64"} <= every
    for name in architectures:
        number = name.removesuffix("+PTX").replace(".", "")
        for kind in ("sm", "compute") if name.endswith("+PTX") else ("sm",):
            found = kernels[f"{kind}_{number}"]
            assert found == every if number.isdigit() else found, f"{kind}_{number}"


def test_b200_gets_ptx_that_it_can_use(python, architectures, tmp_path):
    """No machine code for it is built; newer PTX, as of 12.0, it refuses."""
    if not any(name.endswith("+PTX") and float(name.removesuffix("+PTX")) <= 10.0 for name in architectures):
        pytest.skip(f"built for {architectures} by choice; the default has 9.0+PTX")
    kernels = embedded(library_of(python), tmp_path)
    usable = [name for name in kernels if re.fullmatch(r"compute_\d+", name) and int(name.split("_")[1]) <= 100]
    assert any(kernels[name] == portable(kernels) for name in usable), usable
