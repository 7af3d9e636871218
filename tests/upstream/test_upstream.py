"""The same comparison on the real repositories, from checkouts that an environment variable names.

RFKERNELS_UPSTREAM holds folders of Self-Forcing, Reward-Forcing or LongLive (its v1.0), with the path separator between
them. Each runs in a process of its own: they all call their package ``wan``. Their attention is replaced by torch's, in
both runs, because theirs computes in bfloat16 whatever the model's dtype.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDERS = [Path(folder) for folder in os.environ.get("RFKERNELS_UPSTREAM", "").split(os.pathsep) if folder]
MODELS = [
    (folder, name)
    for folder in FOLDERS
    for name in ("causal_model", "causal_model_infinity")
    if name == "causal_model" or (folder / f"wan/modules/{name}.py").exists()
]


@pytest.mark.skipif(not FOLDERS, reason="RFKERNELS_UPSTREAM names no checkout")
@pytest.mark.parametrize("folder, name", MODELS, ids=lambda x: x.name if isinstance(x, Path) else x)
@pytest.mark.parametrize("dtype, bound", [("float64", 1e-11), ("float32", 1e-5), ("bfloat16", 2**-5)])
def test_patched_model_gives_the_same_latents(folder, name, dtype, bound):
    pytest.importorskip("einops"), pytest.importorskip("diffusers")
    script = Path(__file__).with_name("compare.py")
    done = subprocess.run([sys.executable, script, folder, name, dtype], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(done.stdout.split()[-1]) < bound
