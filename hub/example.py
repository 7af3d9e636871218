# /// script
# requires-python = ">=3.10"
# dependencies = ["kernels", "numpy", "torch"]
# ///
"""A stream of five chunks through the cache, from this folder."""

from pathlib import Path

import kernels
import torch

rf = kernels.get_local_kernel(Path(__file__).parent)
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.bfloat16 if device == "cuda" else torch.float32
print(rf.explain_backends(device)["auto"])

rope = rf.Rope3D(head_dim=64, height=4, width=4)
cache = rf.EMASinkCache(
    num_layers=1, batch_size=1, num_kv_heads=2, head_dim=64, frame_tokens=16, sink_frames=3, window_frames=6,
    alpha=0.999, rope=rope, dtype=dtype, device=device,
)  # fmt: skip
for chunk in range(5):
    q, k, v = (torch.randn(1, 3 * 16, heads, 64, dtype=dtype, device=device) for heads in (4, 2, 2))
    cache.begin_chunk(frames=3)
    out = rf.streaming_attention(q, k, v, cache[0])
    print(f"chunk {chunk}: {tuple(out.shape)}, {int(cache.num_frames)} frames so far")
