"""Writes the Triton kernels as a kernel of the Hugging Face Hub, as its ``kernels`` package loads one.

    python hub/write.py [--out build/hub]

The code is that of rfkernels/: what the kernel's ``__init__`` needs, found by following imports, and nothing is edited.
``hub/package`` has the few modules that stand in for others. Nothing is compiled.

    build/hub/build.toml, CARD.md, README.md, LICENSE, flake.nix, example.py, tests/
    build/hub/torch-ext/rfkernels/        the sources, as kernel-builder takes them
    build/hub/build/torch-{cuda,cpu}/     the variants, as kernels.get_local_kernel and get_kernel load them

Layout: https://github.com/huggingface/kernels, docs/source/kernel-requirements.md and builder/writing-kernels.md.
"""

from __future__ import annotations

import argparse
import ast
import base64
import hashlib
import json
import shutil
from pathlib import Path

NAME = "rfkernels"
VERSION = 0  # by the Hub's convention: a beta, whose functions may still change
LICENSE = "Apache-2.0"
BACKENDS = ("cuda", "cpu")  # where the kernels were executed; the CPU takes torch's attention, or Triton's interpreter

HUB = Path(__file__).resolve().parent
PACKAGE = HUB.parent / "rfkernels"
STAND_INS = HUB / "package"

BUILD_TOML = f"""\
[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "{LICENSE}"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch-noarch]
"""

# Versions of `kernels` that look for a folder of the kernel's name within the variant find this in it.
OLD_ENTRY = '''\
"""For versions of `kernels` that look for the kernel's name: gives what the folder around this one has."""

import importlib.util
import json
import sys
from pathlib import Path

_variant = Path(__file__).resolve().parents[1]
_id = json.loads((_variant / "metadata.json").read_text())["id"]
if _id not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_id, _variant / "__init__.py")
    sys.modules[_id] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_id])
__all__ = sys.modules[_id].__all__
globals().update({name: getattr(sys.modules[_id], name) for name in __all__})
'''


def source(path: Path) -> Path | None:
    """The file that the kernel has at ``path``, relative to its folder; None if the package has no such file."""
    return next((folder / path for folder in (STAND_INS, PACKAGE) if (folder / path).is_file()), None)


def module_file(name: tuple[str, ...]) -> Path | None:
    """Where the kernel has the module of this dotted name, relative to its folder."""
    candidates = [Path(*name).with_suffix(".py")] if name else []
    # A stand-in that is a file takes the place of a folder.
    candidates.append(Path(*name, "__init__.py"))
    return next((path for path in candidates if source(path)), None)


def imported(path: Path) -> set[tuple[str, ...]]:
    """Dotted names, from the kernel's folder on, of what a file may import: modules, and names within them."""
    found = set()
    here = path.parent.parts
    for node in ast.walk(ast.parse(source(path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = here[: len(here) - node.level + 1] + tuple(filter(None, (node.module or "").split(".")))
            found |= {base} | {(*base, alias.name) for alias in node.names}
    return found | {name[:depth] for name in found for depth in range(len(name))}  # and the packages they are in


def files() -> dict[str, bytes]:
    """The kernel's modules by their path: what its ``__init__`` needs."""
    waiting, found = [Path("__init__.py")], {}
    while waiting:
        path = waiting.pop()
        if path.as_posix() not in found:
            found[path.as_posix()] = source(path).read_bytes()
            waiting += [file for name in imported(path) if (file := module_file(name))]
    return dict(sorted(found.items()))


def identifier(backend: str, content: dict[str, bytes]) -> str:
    """The name that the module and its ops have: that of no other content, and of no other variant."""
    digest = hashlib.sha256(b"".join(name.encode() + b"\0" + data + b"\0" for name, data in content.items()))
    return f"_{NAME}_{backend}_{digest.hexdigest()[:10]}"


def metadata(backend: str, content: dict[str, bytes], written: dict[str, bytes]) -> str:
    digests = {name: base64.b64encode(hashlib.sha256(data).digest()).decode() for name, data in written.items()}
    facts = {
        "name": NAME,
        "id": identifier(backend, content),
        "version": VERSION,
        "license": LICENSE,
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(facts, indent=2) + "\n"


def put(folder: Path, content: dict[str, bytes]) -> None:
    for name, data in content.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def write(out: Path) -> None:
    """Writes the whole folder anew.

    Raises:
        SystemExit: ``out`` holds something else.
    """
    toml = out / "build.toml"
    if out.exists() and any(out.iterdir()) and not (toml.is_file() and f'name = "{NAME}"' in toml.read_text()):
        raise SystemExit(f"hub: --out must be new, empty, or what this wrote before, got {out}")
    shutil.rmtree(out, ignore_errors=True)
    content = files()
    put(out / "torch-ext" / NAME, content)
    for backend in BACKENDS:
        variant, written = out / "build" / f"torch-{backend}", content | {f"{NAME}/__init__.py": OLD_ENTRY.encode()}
        put(variant, written)
        (variant / "metadata.json").write_text(metadata(backend, content, written))
    toml.write_text(BUILD_TOML)
    card = (HUB / "CARD.md").read_bytes()
    for name in ("README.md", "CARD.md", "build/CARD.md"):  # the repository's page; kernel-builder's two
        (out / name).write_bytes(card)
    for name in ("flake.nix", "example.py"):
        shutil.copyfile(HUB / name, out / name)
    shutil.copyfile(HUB.parent / "LICENSE", out / "LICENSE")
    shutil.copytree(HUB / "tests", out / "tests", ignore=shutil.ignore_patterns("__pycache__"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HUB.parent / "build" / "hub", help="folder to write (build/hub)")
    out = parser.parse_args().out
    write(out)
    print(f"{out}: {len(files())} modules, variants {', '.join(f'torch-{backend}' for backend in BACKENDS)}")


if __name__ == "__main__":
    main()
