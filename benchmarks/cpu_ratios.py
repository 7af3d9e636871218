"""CPU ratios: ``python -m benchmarks.cpu_ratios``. Everything is a ratio of two things timed in turn in one process.

A pass of streaming attention against torch's scaled_dot_product_attention on ready-made contiguous tensors, a whole
chunk of five passes by the usual procedure against ours, and the Re-DMD loss against published and plain torch code.
Results are compared first.
"""

from __future__ import annotations

import argparse
import json
import platform

import torch
import torch.nn.functional as F

import rfkernels as rf
from benchmarks import usual
from benchmarks.timing import interleaved, keep_memory, ratio
from rfkernels.losses import redmd_loss

HEADS, HEAD_DIM, SINK, WINDOW, FRAMES, PASSES, ALPHA = 12, 128, 3, 6, 3, 5, 0.999


def phases(rope: rf.Rope3D) -> torch.Tensor:
    tables = rope.tables(torch.device("cpu"), torch.float64)
    frames = torch.outer(torch.arange(SINK + WINDOW).double(), rope.frequencies[0])[:, None]
    time = torch.polar(torch.ones_like(frames), frames).expand(-1, rope.frame_tokens, -1)
    space = torch.view_as_complex(tables.spatial)[None].expand(len(time), -1, -1)
    return torch.cat([time, space], -1)


def attention(height: int, width: int, dtype: torch.dtype, seconds: float) -> dict:
    tokens, rope = height * width, rf.Rope3D(HEAD_DIM, height, width)
    cache = rf.EMASinkCache(
        num_layers=1, batch_size=1, num_kv_heads=HEADS, head_dim=HEAD_DIM, frame_tokens=tokens, sink_frames=SINK,
        window_frames=WINDOW, alpha=ALPHA, rope=rope, dtype=dtype, device="cpu",
    )  # fmt: skip
    old = usual.UsualCache(HEADS, HEAD_DIM, tokens, SINK, WINDOW, phases(rope), ALPHA, dtype)
    clock = iter(range(10**9))

    def chunk():
        return [torch.randn(1, FRAMES * tokens, HEADS, HEAD_DIM).to(dtype) for _ in range(3)]

    for _ in range(5):  # fill the window and evict
        q, k, v = chunk()
        start = next(clock) * FRAMES * tokens
        cache.begin_chunk(FRAMES)
        ours, theirs = rf.streaming_attention(q, k, v, cache[0]), old.attend(q, k, v, start)
    gap = (ours.double() - theirs.double()).abs().max().item()
    assert gap < (2e-5 if dtype == torch.float32 else 2e-2), f"results differ by {gap}"

    ready_q = torch.randn(1, HEADS, FRAMES * tokens, HEAD_DIM).to(dtype)
    ready_k, ready_v = (torch.randn(1, HEADS, (SINK + WINDOW) * tokens, HEAD_DIM).to(dtype) for _ in range(2))

    def sdpa():
        F.scaled_dot_product_attention(ready_q, ready_k, ready_v)

    def later():
        rf.streaming_attention(q, k, v, cache[0])

    def first():
        cache.begin_chunk(FRAMES)
        rf.streaming_attention(q, k, v, cache[0])

    def our_chunk():
        cache.begin_chunk(FRAMES)
        for _ in range(PASSES):
            rf.streaming_attention(q, k, v, cache[0])

    def usual_chunk():
        start = next(clock) * FRAMES * tokens
        for _ in range(PASSES):
            old.attend(q, k, v, start)

    row = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch.")}
    for name, function, floor in (
        ("later pass / SDPA", later, sdpa),
        ("first pass / SDPA", first, sdpa),
        ("usual / ours, a chunk", usual_chunk, our_chunk),
    ):
        times = interleaved({"floor": floor, "it": function}, seconds)
        row[name] = ratio(times, "it", "floor")
    return row


def loss(masked: bool, seconds: float) -> dict:
    shape, guidance = (1, 21, 16, 60, 104), 3.0
    x, fake, cond, uncond = (torch.randn(shape) for _ in range(4))
    x.requires_grad_()
    mask = torch.rand(shape) > 0.3 if masked else None
    weight = torch.tensor([1.7])

    def run(function):
        x.grad = None
        function(x, fake, cond, uncond, weight, guidance_scale=guidance, mask=mask).backward()

    def published():
        x.grad = None
        usual.published_loss(x, fake, cond, uncond, weight[0], guidance, mask).backward()

    def plain():
        x.grad = None
        usual.plain_loss(x, fake, cond, uncond, weight[0], guidance, mask).backward()

    def ours():
        run(redmd_loss)

    results = []
    for function in (published, plain, ours):
        function()
        results.append(x.grad.clone())
    for grad in results[1:]:
        torch.testing.assert_close(grad, results[0], rtol=1e-4, atol=1e-9)
    times = interleaved({"ours": ours, "published": published, "plain": plain}, 2 * seconds)
    row = {"mask": masked}
    for name in ("published", "plain"):
        row[f"{name} / ours"] = ratio(times, name, "ours")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_ratios", description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="per pair")
    parser.add_argument(
        "--keep-memory", action="store_true", help="tell glibc to keep freed memory (timing.keep_memory)"
    )
    parser.add_argument("--json", help="also write the numbers here")
    args = parser.parse_args()
    if args.keep_memory:
        keep_memory()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}; median (20 %, 80 %)")
    rows = []
    with torch.no_grad():
        for size in ((8, 8), (16, 16), (15, 26)):
            for dtype in (torch.float32, torch.bfloat16):
                rows.append(attention(*size, dtype, args.seconds))
                show(rows[-1])
    for masked in (False, True):
        rows.append(loss(masked, args.seconds))
        show(rows[-1])
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)


def show(row: dict) -> None:
    cells = [f"{k} {v[0]:.3f} ({v[1]:.3f}, {v[2]:.3f})" if isinstance(v, tuple) else f"{k} {v}" for k, v in row.items()]
    print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
