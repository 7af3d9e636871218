"""The kernel of the Hub that hub/write.py makes: what is in it, and that it works beside an installed rfkernels."""

import ast
import base64
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hub():
    spec = importlib.util.spec_from_file_location("rfkernels_hub_write", ROOT / "hub" / "write.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(hub, tmp_path_factory):
    """What `make hub` writes."""
    out = tmp_path_factory.mktemp("hub") / "kernel"
    hub.write(out)
    return out


def modules(folder):
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}


# --- what is in it ----------------------------------------------------------------------------------------------------


def test_it_needs_torch_triton_and_the_standard_library_alone(folder):
    """Wherever a module imports; of the package itself by relative names, which work under any name."""
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    for name, path in modules(folder / "build" / "torch-cuda").items():
        for node in ast.walk(ast.parse(path.read_text())):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found = [node.module]
            assert {module.split(".")[0] for module in found} <= allowed, (name, found)


def test_modules_are_the_packages_own(folder):
    """Byte for byte, but for those that stand in for others; and all that the Triton backend has is there."""
    written = modules(folder / "torch-ext" / "rfkernels")
    stand_ins = modules(ROOT / "hub" / "package")
    for name, path in written.items():
        origin = stand_ins.get(name, ROOT / "rfkernels" / name)
        assert path.read_bytes() == origin.read_bytes(), name
    assert stand_ins.keys() <= written.keys()
    triton = modules(ROOT / "rfkernels" / "backends" / "triton")
    assert {f"backends/triton/{name}" for name in triton} <= written.keys()
    assert not [name for name in written if name.startswith(("models/", "training/", "tools/", "integrations/"))]


def test_variants_and_their_metadata(hub, folder):
    variants = sorted(path.name for path in (folder / "build").iterdir() if path.is_dir())
    assert variants == ["torch-cpu", "torch-cuda"]
    names = set()
    for variant in variants:
        at = folder / "build" / variant
        facts = json.loads((at / "metadata.json").read_text())
        assert (facts["name"], facts["version"], facts["license"]) == ("rfkernels", 0, "Apache-2.0")
        assert facts["backend"] == {"type": variant.removeprefix("torch-")}
        assert facts["id"].isidentifier() and facts["id"].startswith("_rfkernels_")
        names.add(facts["id"])
        files = {name: path.read_bytes() for name, path in modules(at).items()}
        digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in files.items()}
        assert facts["digest"] == {"algorithm": "sha256", "files": digests}
    assert len(names) == 2
    # A name belongs to a content.
    content = hub.files()
    assert hub.identifier("cpu", content) in names
    assert hub.identifier("cpu", content | {"rope.py": b""}) not in names


def test_what_lies_beside_them(folder):
    for name in ("CARD.md", "README.md", "LICENSE", "build.toml", "flake.nix", "example.py", "tests/test_rfkernels.py"):
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "README.md").read_text().startswith("---\nlibrary_name: kernels\nlicense: apache-2.0\n")
    public = ast.literal_eval((folder / "torch-ext/rfkernels/__init__.py").read_text().split("__all__ = ")[1])
    card = (folder / "README.md").read_text()
    assert all(f"`{name}`" in card for name in public)
    if sys.version_info >= (3, 11):
        import tomllib

        toml = tomllib.loads((folder / "build.toml").read_text())
        assert toml["general"]["edition"] == 5 and toml["general"]["backends"] == ["cuda", "cpu"]
        assert toml["torch-noarch"] == {}


def test_it_is_written_anew_and_overwrites_nothing_else(hub, tmp_path):
    hub.write(tmp_path / "kernel")
    (tmp_path / "kernel" / "torch-ext" / "left over.py").touch()
    hub.write(tmp_path / "kernel")
    assert not (tmp_path / "kernel" / "torch-ext" / "left over.py").exists()
    with pytest.raises(SystemExit, match="--out must be new, empty, or what this wrote before"):
        hub.write(tmp_path)
    assert (tmp_path / "kernel").exists()


# --- that it works ----------------------------------------------------------------------------------------------------

# Loads the variants by their path, as `kernels` does, and compares them with the package and with each other.
COMPARE = """
import importlib.util, json, sys
from pathlib import Path
import torch

torch.set_num_threads(1)
BUILD, LOADER, BACKEND = Path(sys.argv[1]) / "build", sys.argv[2], sys.argv[3]


def by_path(variant, entry="__init__.py"):
    name = json.loads((BUILD / variant / "metadata.json").read_text())["id"] if entry == "__init__.py" else "old"
    spec = importlib.util.spec_from_file_location(name, BUILD / variant / entry)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def stream(rf):
    random = torch.Generator().manual_seed(0)
    results = []
    with rf.use_backend(BACKEND):
        cache = rf.EMASinkCache(
            num_layers=1, batch_size=1, num_kv_heads=1, head_dim=32, frame_tokens=4, sink_frames=2, window_frames=3,
            alpha=0.9, rope=rf.Rope3D(32, 2, 2), dtype=torch.float32, device="cpu")
        for _ in range(4):
            q, k, v = (torch.randn(1, 8, heads, 32, generator=random) for heads in (2, 1, 1))
            cache.begin_chunk(2)
            results.append(rf.streaming_attention(q, k, v, cache[0]))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        out, lse = rf.sink_window_attention(q, k, v, sink_tokens=1, window_tokens=3, return_lse=True)
        out, _ = rf.merge_attention(out, lse, out.detach(), lse.detach())
        results += [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
        x, *latents = (torch.randn(2, 8, generator=random) for _ in range(4))
        loss = rf.losses.redmd_loss if hasattr(rf, "losses") else rf.redmd_loss
        results.append(loss(x, *latents, torch.ones(2)))
    return [x.detach() for x in results]


def alone():
    assert not [name for name in sys.modules if name.split(".")[0] in ("rfkernels", "rfkernels_hub_write")]


if LOADER == "kernels":
    import kernels

    hub = kernels.get_local_kernel(BUILD.parent, backend="cpu")
    assert hub is kernels.get_local_kernel(BUILD.parent, backend="cpu")
else:
    hub = by_path("torch-cpu")
alone()
first = stream(hub)
other = by_path("torch-cuda")  # the same code under another name: as two versions of the kernel
alone()
old = by_path("torch-cpu", "rfkernels/__init__.py")
assert old.streaming_attention is hub.streaming_attention

import rfkernels

for rf in (other, hub):
    assert all(map(torch.equal, stream(rf), first))
for got, wanted in zip(stream(rfkernels), first, strict=True):
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)  # where the package has compiled loops
namespaces = {rf.__name__ for rf in (hub, other, rfkernels)}
ops = {getattr(torch.ops, name).streaming_attention.default for name in namespaces}
assert len(ops) == 3, ops
q = torch.randn(1, 9, 2, 32)
compiled = torch.compile(lambda q: hub.sink_window_attention(q, q, q, sink_tokens=1, window_tokens=3), fullgraph=True,
                         backend="eager")
assert torch.equal(compiled(q), hub.sink_window_attention(q, q, q, sink_tokens=1, window_tokens=3))
print("the same numbers under", sorted(namespaces))
"""


def compare(folder, loader, backend, **environment):
    command = [sys.executable, "-c", COMPARE, str(folder), loader, backend]
    environment = {"PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the same numbers under ['_rfkernels_cpu_" in done.stdout


def test_beside_the_package_and_another_version(folder):
    compare(folder, "path", "sdpa")


def test_its_triton_kernels_beside_the_package(folder):
    pytest.importorskip("triton")
    from rfkernels.backends.triton import _interpreter_fault

    if reason := _interpreter_fault():
        pytest.skip(reason)
    compare(folder, "path", "triton", TRITON_INTERPRET="1")


def test_loaded_by_the_kernels_package(folder):
    pytest.importorskip("kernels")
    compare(folder, "kernels", "reference")


def test_the_tests_it_comes_with(folder):
    pytest.importorskip("kernels")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    environment = os.environ | ({} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"})
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "6 passed" in done.stdout


def test_the_kernels_package_takes_its_files(folder):
    """Its own parser of build.toml and metadata.json, and its own digest."""
    data = pytest.importorskip("kernels_data")
    for variant in ("torch-cpu", "torch-cuda"):
        facts = data.Metadata.read_from_file(folder / "build" / variant / "metadata.json")
        digest = data.Digest.hash_variant(data.DigestAlgorithm.SHA256, folder / "build" / variant)
        assert facts.digest.files == digest.files
    if hasattr(data, "Build"):
        assert str(data.Build.open(folder).general.name) == "rfkernels"
