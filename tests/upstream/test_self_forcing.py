"""The patch on the real models, from checkouts of their repositories.

``RFKERNELS_UPSTREAM`` names the folders of Reward-Forcing, Self-Forcing and LongLive 1 (branch v1.0), any of them,
separated as in PATH. Nothing of theirs is changed; only attention is by torch, which works on a CPU and in float64.
"""

import copy
import importlib
import inspect
import os
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rfkernels.integrations.self_forcing import patch

FOLDERS = [Path(folder) for folder in os.environ.get("RFKERNELS_UPSTREAM", "").split(os.pathsep) if folder]
MODULES = [
    pytest.param((folder, name), id=f"{folder.name}-{name}")
    for folder in FOLDERS
    for name in ("causal_model", "causal_model_infinity")
    if (folder / "wan" / "modules" / f"{name}.py").exists()
]
if not MODULES:
    pytest.skip("RFKERNELS_UPSTREAM names no checkout of a model of the family", allow_module_level=True)

DIM, HEADS, LAYERS, ROWS, COLUMNS, CHUNK = 48, 2, 2, 2, 3, 3
TOKENS, HEAD_DIM = ROWS * COLUMNS, DIM // HEADS
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-6}  # of the largest output


def dense(q, k, v, *args, **kwargs):
    return F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v))).transpose(1, 2)


def loaded(folder, name, monkeypatch):
    """A module of theirs, without the packages' own imports (text encoder, VAE, GPU)."""
    for known in [m for m in sys.modules if m.split(".")[0] in ("wan", "utils")]:
        monkeypatch.delitem(sys.modules, known)
    stubs = {
        "wan": {"__path__": [str(folder / "wan")]},
        "wan.modules": {"__path__": [str(folder / "wan" / "modules")]},
        "utils": {"__path__": []},
        "utils.debug_option": {"DEBUG": False},
        "utils.memory": dict.fromkeys(
            ("gpu", "get_cuda_free_memory_gb", "DynamicSwapInstaller", "log_gpu_memory"), None
        ),
    }
    if importlib.util.find_spec("einops") is None:
        stubs["einops"] = {"repeat": None}
    for stub, contents in stubs.items():
        module = types.ModuleType(stub)
        module.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, stub, module)
    module = importlib.import_module(f"wan.modules.{name}")
    monkeypatch.setattr(module, "attention", dense)
    monkeypatch.setattr(sys.modules["wan.modules.model"], "flash_attention", dense)
    return module


@pytest.fixture(params=MODULES)
def model(request, monkeypatch):
    module = loaded(*request.param, monkeypatch)
    torch.manual_seed(0)
    model = module.CausalWanModel(
        dim=DIM, ffn_dim=64, num_heads=HEADS, num_layers=LAYERS, local_attn_size=9, sink_size=3, text_dim=16,
        text_len=8, freq_dim=16, in_dim=4, out_dim=4,
    )  # fmt: skip
    torch.nn.init.normal_(model.head.head.weight)
    return model.eval().requires_grad_(False)


@pytest.fixture(params=sorted(TOLERANCE, key=str), ids=str)
def pair(request, model):
    """Their model, a patched copy, and a function that runs both and compares."""
    dtype = request.param
    old = model.to(dtype)
    new = copy.deepcopy(old)
    undo = patch(new)
    caches = [[], []]

    def same(start, frames=CHUNK, seed=0, text=0, **switch):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 4, frames, 2 * ROWS, 2 * COLUMNS, generator=generator, dtype=torch.float64).to(dtype)
        context = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(text), dtype=torch.float64).to(dtype)
        t = torch.full((1, frames), 500.0 - 100 * (seed % 5))
        outs = [
            m(
                x, t=t, context=context, seq_len=32760, kv_cache=cache, crossattn_cache=crossattn_caches(dtype),
                current_start=start * TOKENS, cache_start=None, **switch,
            )
            for m, cache in zip((old, new), caches, strict=True)
        ]  # fmt: skip
        error = (outs[0] - outs[1]).abs().max() / outs[0].abs().max()
        assert error <= TOLERANCE[dtype], f"at frame {start}: {error:.2e}"

    def allocate():
        for cache in caches:
            cache[:] = kv_caches(dtype)

    allocate()
    return types.SimpleNamespace(old=old, new=new, undo=undo, same=same, allocate=allocate, caches=caches)


def kv_caches(dtype):
    def layer():
        k, v = (torch.zeros(1, 9 * TOKENS, HEADS, HEAD_DIM, dtype=dtype) for _ in "kv")
        return {"k": k, "v": v, "global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0])}

    return [layer() for _ in range(LAYERS)]


def crossattn_caches(dtype):
    def layer():
        k, v = (torch.zeros(1, 8, HEADS, HEAD_DIM, dtype=dtype) for _ in "kv")
        return {"k": k, "v": v, "is_init": False}

    return [layer() for _ in range(LAYERS)]


def video(pair, chunks, first=0, seed=0):
    for chunk in range(chunks):
        for step in range(5):
            pair.same(first + CHUNK * chunk, seed=seed + 5 * chunk + step)


@torch.no_grad()
def test_two_videos_a_recache_and_undo(pair):
    video(pair, 12)
    pair.allocate()
    video(pair, 6, seed=100)
    pair.same(12, 6, text=1)
    if "sink_recache_after_switch" in inspect.signature(pair.old._forward_inference).parameters:  # LongLive
        pair.same(9, 9, text=2)
        pair.same(9, 9, text=3, sink_recache_after_switch=True)
    video(pair, 4, first=18, seed=200)
    pair.undo()
    pair.allocate()
    video(pair, 4)
