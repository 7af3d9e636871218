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
    (loaded,) = Path(native.__file__).parent.glob("rfkernels_kernels.*")
    sources = [ROOT / "CMakeLists.txt", *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]
    variables = {"TORCH_CUDA_ARCH_LIST": native.cuda_architectures, "RFKERNELS_HEAD_DIMS": native.build.cuda_head_dims}
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
    if missing := {"pip", "wheel"} - installed:  # looked up, for importing pip swaps distutils under setuptools
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
    single = {"setup.py", "pyproject.toml", "CMakeLists.txt", "Makefile", "README.md", "CHANGELOG.md", "LICENSE"}
    folders = files_under("cmake", "csrc", "rfkernels", "benchmarks", "tests", "docs", "examples", "extras")
    missing = (single | {name for name in folders if "/build/" not in name and ".egg-info/" not in name}) - names
    assert not missing


def test_it_holds_the_package_and_its_licence(wheel):
    """Every file of the tree that belongs in it, the compiled part, and nothing else: no weights and no benchmarks."""
    expected = {name for name in files_under("rfkernels") if "/tiny/weights/" not in name}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        compiled = {name for name in names if name.endswith(".so")}
        assert names - compiled == expected
        assert compiled == {"rfkernels/rfkernels_kernels.so"}
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
        metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
        assert metadata["License-Expression"] == "Apache-2.0" and metadata["License-File"] == "LICENSE"
        assert metadata["Name"] == "rfkernels" and any(x.startswith("torch") for x in metadata.get_all("Requires-Dist"))
        for name, digest, _ in csv.reader(archive.read(f"{info}/RECORD").decode().splitlines()):
            if digest:
                found = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest()).decode().rstrip("=")
                assert digest == f"sha256={found}", name
        assert metadata["Author"] and metadata["Keywords"] and metadata.get_all("Project-URL")
        assert {"Operating System :: POSIX :: Linux", "Typing :: Typed"} <= set(metadata.get_all("Classifier"))
    assert "-py3-none-linux_" in wheel.name, "one library serves every Python"


def test_the_tag_of_an_old_glibc_would_be_true(wheel, tmp_path):
    """`make wheel` gives it to auditwheel: manylinux_2_28 is what torch's own wheels ask for."""
    for tool in ("auditwheel", "patchelf"):
        if not shutil.which(tool, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            pytest.skip(f"{tool} is needed")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # where patchelf may be
    excluded = ["--exclude", "libtorch_cpu.so", "--exclude", "libc10.so"]
    command = ["auditwheel", "repair", *excluded, "--plat", "manylinux_2_28_x86_64", "-w", tmp_path, wheel]
    run(sys.executable, "-m", *command, cwd=tmp_path, PATH=path)
    (tagged,) = tmp_path.glob("*manylinux_2_28_x86_64.whl")
    with zipfile.ZipFile(wheel) as ours, zipfile.ZipFile(tagged) as theirs:
        libraries = {name for name in theirs.namelist() if ".so" in name}
        assert libraries == {"rfkernels/rfkernels_kernels.so"}, "nothing was copied into it"
        assert all(theirs.read(name) == ours.read(name) for name in libraries)


def packed(folder: Path, source: Path, **environment: str) -> bytes:
    made = ["build", "-b", folder / "build", "bdist_wheel", "-b", folder / "bdist", "-d", folder]
    folder.mkdir()
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", folder, *made, cwd=source, **environment)
    (found,) = folder.glob("*.whl")
    return found.read_bytes()


def test_made_twice_it_is_the_same_bytes(wheel, request, setup_py, tmp_path):
    """With a date given; in another folder. (`wheel` has skipped where none can be made.)"""
    environment = kept_build(setup_py) | {"SOURCE_DATE_EPOCH": "1700000000"}
    assert packed(tmp_path / "one", ROOT, **environment) == packed(tmp_path / "two", ROOT, **environment)


@pytest.mark.slow
def test_compiled_twice_it_is_the_same_bytes(source_distribution, tmp_path):
    """From two folders, without what only nvcc compiles where there is none."""
    wheels = []
    for name in ("one", "another/folder"):
        (tmp_path / name).mkdir(parents=True)
        with tarfile.open(source_distribution) as archive:
            archive.extractall(tmp_path / name / "source", filter="data")
        (source,) = (tmp_path / name / "source").iterdir()
        variables = {"TORCH_CUDA_ARCH_LIST": "8.0", "RFKERNELS_HEAD_DIMS": "64", "SOURCE_DATE_EPOCH": "1700000000"}
        wheels.append(packed(tmp_path / name / "made", source, **variables))
    assert wheels[0] == wheels[1]


@pytest.fixture(scope="module")
def extras(tmp_path_factory) -> Path:
    """The wheel of rfkernels-extras, from the source tree as it is."""
    folder = tmp_path_factory.mktemp("extras")
    made = ["egg_info", "-e", folder, "build", "-b", folder / "build", "bdist_wheel", "-b", folder / "bdist"]
    run(sys.executable, "setup.py", "-q", *made, "-d", folder, cwd=ROOT / "extras")
    (found,) = folder.glob("*.whl")
    return found


def test_the_second_wheel_holds_weights_and_benchmarks(extras, wheel):
    with zipfile.ZipFile(extras) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        weights = {
            f"rfkernels_extras/weights/{Path(name).name}" for name in files_under("rfkernels/tools/tiny/weights")
        }
        benchmarks = {f"rfkernels_extras/{name}" for name in files_under("benchmarks")}
        assert names == {"rfkernels_extras/__init__.py", *weights, *benchmarks}
        (info,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        wanted = Parser().parsestr(archive.read(info).decode())["Requires-Dist"]
    assert (
        wanted == f"rfkernels=={rf.__version__}"
        and f"-{rf.__version__}-" in wheel.name
        and rf.__version__ in extras.name
    )


# --- installed --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def python(wheel, extras, tmp_path_factory) -> Path:
    """The interpreter of an environment with both wheels, and the running one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv").glob("lib/python*/site-packages")
    shared = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Folders named in a .pth file have their own .pth files, as those of editable installs, left alone.
    (packages / "shared.pth").write_text("\n".join(shared))
    install = ["install", "-q", "--no-deps", "--no-index", "--no-compile", wheel, extras]
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
    assert info["CUDA kernels"].startswith(("CUDA ", "none: ")), info
    assert info["auto"].startswith("on "), info


def test_demo_and_bench_say_what_they_lack(python, tmp_path):
    """Without the second wheel: what it is and where the files are too."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    for command in ("demo", "bench"):
        code = (
            "import sys; sys.modules['rfkernels_extras'] = None\n"
            "import importlib.util as u, runpy; found = u.find_spec\n"
            "u.find_spec = lambda name, *more: None if name == 'rfkernels_extras' else found(name, *more)\n"
            f"sys.argv = ['rfkernels', '{command}']; runpy.run_module('rfkernels', run_name='__main__')\n"
        )
        done = subprocess.run([python, "-c", code], cwd=tmp_path, env=kept, capture_output=True, text=True)
        assert done.returncode and "rfkernels-extras" in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_it_works_from_another_folder(python, architectures, tmp_path):
    script = shutil.copy(ROOT / "tests" / "installed.py", tmp_path)
    said = run(python, script, "compiled CPU loops", *(["cuda"] if architectures else []), cwd=tmp_path)
    assert "reference and sdpa agree" in said and "with the demo's model" in said


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
