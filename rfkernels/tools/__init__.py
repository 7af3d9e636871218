"""Command-line tools: the demonstration, videos from text, and training of the small model."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def extras_folder(name: str) -> Path | None:
    """A folder of the distribution rfkernels-extras (``extras/`` in the source tree), if that is installed."""
    spec = importlib.util.find_spec("rfkernels_extras")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).with_name(name)
    return folder if folder.is_dir() else None
