"""What commands ask before they begin, so that minutes of work do not end in a folder that cannot be written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch


def writable_folder(option: str, folder: Path) -> None:
    """Makes ``folder`` and tries it.

    Raises:
        ValueError: it cannot be made or written, naming the option.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{option} must be a folder that can be written, got {folder}: {error.strerror}") from error


def writable_file(option: str, path: Path) -> None:
    """Tries the folder that ``path`` is in, which must exist.

    Raises:
        ValueError: the file cannot be written, naming the option.
    """
    try:
        if path.is_dir():
            raise ValueError(f"{option} must be a file, got the folder {path}")
        if not path.parent.is_dir():
            raise ValueError(f"{option} must be in an existing folder, there is no {path.parent}")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=path.suffix):
            pass  # the name too: it may be too long
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{option} must be a file that can be written, got {path}: it is read-only")
    except OSError as error:
        raise ValueError(f"{option} must be a file that can be written, got {path}: {error.strerror}") from error


def partial_path(path: Path) -> Path:
    """Where ``path`` is written until it is finished: the same suffix, by which writers know the format."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


@contextlib.contextmanager
def finished(path: Path) -> Iterator[Path]:
    """A path to write to; what is there becomes ``path`` at the end, if there was no error."""
    partial = partial_path(path)
    partial.unlink(missing_ok=True)
    yield partial
    os.replace(partial, path)


def chosen_device(name: str | None) -> torch.device:
    """The device of ``--device``, default cuda where there is one.

    Raises:
        ValueError: no device, or one that torch cannot use here.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    # torch built without CUDA asserts.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--device must be one that is here, such as {', '.join(there)}, got {name}: {reason}"
        ) from error
    return device
