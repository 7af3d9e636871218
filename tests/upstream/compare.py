"""compare.py CHECKOUT MODULE DTYPE: the largest relative difference of 12 chunks x 5 passes, unpatched and patched.

LongLive's prompt switch is in it: after chunk 6 the newest frames are computed again under another prompt.
"""

import importlib
import inspect
import sys
import types
from pathlib import Path

import torch
from torch.nn import functional

LAYERS, HEADS, DIM, GRID, FRAMES = 2, 2, 48, (3, 4), 3
TOKENS = GRID[0] * GRID[1]


def load(checkout, module):
    """Their module without their package's __init__, which imports tokenizers and more."""
    for name in ("wan", "wan.modules"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(Path(checkout, *name.split(".")))]
    memory = sys.modules["utils.memory"] = types.ModuleType("utils.memory")  # LongLive's asks for a GPU when imported
    for name in ("gpu", "get_cuda_free_memory_gb", "DynamicSwapInstaller", "log_gpu_memory"):
        setattr(memory, name, lambda *_, **__: None)
    sys.path.insert(0, str(checkout))
    models = importlib.import_module("wan.modules.model"), importlib.import_module(f"wan.modules.{module}")

    def attention(q, k, v, *_, **__):
        return functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    models[0].flash_attention = models[1].attention = attention
    return models[1]


def caches(dtype, local):
    heads = (HEADS, DIM // HEADS)
    own = [
        {"k": torch.zeros(1, local * TOKENS, *heads, dtype=dtype),
         "v": torch.zeros(1, local * TOKENS, *heads, dtype=dtype),
         "global_end_index": torch.tensor([0]), "local_end_index": torch.tensor([0])}
        for _ in range(LAYERS)
    ]  # fmt: skip
    cross = [
        {"k": torch.zeros(1, 8, *heads, dtype=dtype), "v": torch.zeros(1, 8, *heads, dtype=dtype), "is_init": False}
        for _ in range(LAYERS)
    ]
    return own, cross


def stream(model, dtype, switches):
    kv, cross = caches(dtype, 9)
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)

    prompts, clean = [draw(1, 8, 32), draw(1, 8, 32)], []

    def call(x, prompt, start, **options):
        return model(
            x, t=torch.full((1, x.shape[2]), 500.0, dtype=dtype), context=prompt, seq_len=9 * TOKENS, kv_cache=kv,
            crossattn_cache=cross, current_start=start * TOKENS, **options,
        )  # fmt: skip

    for chunk in range(12):
        if switches and chunk == 6:
            for layer in cross:
                layer["is_init"] = False
            call(torch.cat(clean[-3:], 2), prompts[1], 9, sink_recache_after_switch=switches == "sinks")
            for layer in cross:
                layer["is_init"] = False
        for _ in range(5):
            x = draw(1, 16, FRAMES, 2 * GRID[0], 2 * GRID[1])
            yield call(x, prompts[bool(switches) and chunk >= 6], chunk * FRAMES)
        clean.append(x)


@torch.no_grad()
def main(checkout, module, dtype):
    import rfkernels as rf

    dtype = getattr(torch, dtype)
    theirs = load(checkout, module)
    torch.manual_seed(0)
    model = theirs.CausalWanModel(
        dim=DIM, ffn_dim=96, num_heads=HEADS, num_layers=LAYERS, freq_dim=32, text_dim=32, text_len=8,
        local_attn_size=9, sink_size=3,
    ).eval()  # fmt: skip
    for parameter in model.parameters():  # their head begins at zero
        torch.nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype)
    signature = inspect.signature(theirs.CausalWanSelfAttention.forward).parameters
    worst = 0.0
    for switches in (False, "window", "sinks") if "sink_recache_after_switch" in signature else (False,):
        before = list(stream(model, dtype, switches))
        undo = rf.integrations.self_forcing.patch(model)
        after = list(stream(model, dtype, switches))
        undo()
        undo = rf.integrations.self_forcing.patch(model, alpha=0.5)
        other = list(stream(model, dtype, switches))
        undo()
        assert not torch.allclose(other[-1], after[-1], rtol=0, atol=1e-6), "the comparison does not see the sinks"
        assert all(torch.equal(a, b) for a, b in zip(before, stream(model, dtype, switches), strict=True))
        assert len(before) == 60 and all(x.isfinite().all() for x in before)
        scale = max(float(x.abs().max()) for x in before)
        errors = [float((a.double() - b.double()).abs().max()) / scale for a, b in zip(before, after, strict=True)]
        worst = max(worst, *errors)
    print(theirs.__name__, switches, worst)


if __name__ == "__main__":
    main(*sys.argv[1:])
