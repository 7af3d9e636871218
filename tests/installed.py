"""Uses an installed rfkernels, in whatever environment runs this file; copy it to an empty folder first.

    python installed.py "compiled CPU loops" [cuda]

The text is what explain_backends() must say of the CPU loops. "cuda": the CUDA library must be there and loaded.
"""

import importlib.util
import sys
from pathlib import Path

import torch

import rfkernels as rf
from rfkernels import native
from rfkernels.tools.tiny import streams

CUDA_OPERATORS = (
    *("rfkernels_native::" + name for name in ("begin_chunk", "write", "rotate", "streaming_attention", "redmd_loss")),
    *("rfkernels_cuda::" + name for name in ("attention_forward", "attention_backward")),
)


def run(backend: str) -> list[torch.Tensor]:
    """A stream, its gradients, and the Re-DMD loss with its own."""
    random = torch.Generator().manual_seed(0)
    with rf.use_backend(backend):
        cache = rf.EMASinkCache(
            num_layers=1, batch_size=1, num_kv_heads=2, head_dim=16, frame_tokens=4, sink_frames=2, window_frames=3,
            rope=rf.Rope3D(16, 2, 2), dtype=torch.float32, device="cpu",
        )  # fmt: skip
        for _ in range(6):
            cache.begin_chunk(2)
            q, k, v = leaves = [torch.randn(1, 8, 2, 16, generator=random, requires_grad=True) for _ in range(3)]
            out = rf.streaming_attention(q, k, v, cache[0])
        out.sin().sum().backward()
        x, fake, real = (torch.randn(1, 8, generator=random) for _ in range(3))
        loss = rf.losses.ReDMDLoss()(x.requires_grad_(), fake, real, None, torch.zeros(1))
        loss.backward()
    return [out.detach(), cache.k, cache.sink_v, loss.detach(), x.grad, *(leaf.grad for leaf in leaves)]


def loaded_cuda() -> str:
    """What is registered for CUDA tensors; it raises where the library, or one of its parts, did not load."""
    assert native.cuda_missing is None, native.cuda_missing
    for name in CUDA_OPERATORS:
        found = torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")
        assert found, f"{name} has no CUDA kernel"
    if torch.cuda.is_available():
        return f"CUDA: {rf.explain_backends('cuda')['cuda']}"
    why = rf.explain_backends("cuda")["cuda"]
    assert why == "not available: torch sees no CUDA device", why
    return f"CUDA library loaded, built for {native.cuda_architectures}; backend cuda {why}"


if __name__ == "__main__":
    loops, *cuda = sys.argv[1:]
    assert Path(rf.__file__).is_relative_to(sys.prefix), f"not the installed package: {rf.__file__}"
    extras = importlib.util.find_spec("rfkernels_extras") is not None
    if extras:
        importlib.import_module("rfkernels_extras.benchmarks.command")  # of python -m rfkernels bench
        assert streams.load().config.dim == 256  # of python -m rfkernels demo
    assert loops in rf.explain_backends("cpu")["sdpa"], rf.explain_backends("cpu")["sdpa"]
    results = {backend: run(backend) for backend in ("reference", "sdpa")}
    for ours, exact in zip(results["sdpa"], results["reference"], strict=True):
        torch.testing.assert_close(ours, exact)
    print(f"torch {torch.__version__}: {' and '.join(results)} agree, forward and backward, with {loops}")
    print(f"{'with' if extras else 'without'} the demo's model and the benchmarks")
    print(loaded_cuda() if cuda else f"no CUDA kernels: {native.cuda_missing}")
