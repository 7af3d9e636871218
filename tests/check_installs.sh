#!/usr/bin/env bash
# Installs the package in fresh environments and uses it from another folder:
#   tests/check_installs.sh cpu     CPU-only torch 2.13, no nvcc: compiled CPU kernels
#   tests/check_installs.sh python  torch 2.9: Python-only, saying so
# Needs a package index (minutes; the second downloads several GB where 2.9 has no small build). TORCH=... picks another.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
case "${1:-cpu}" in
  cpu) torch=${TORCH:-torch==2.13.0} expected="compiled CPU loops" ;;
  python) torch=${TORCH:-torch==2.9.1} expected="no compiled CPU loops" ;;
  *) echo "usage: $0 cpu|python" >&2; exit 2 ;;
esac
git -C "$root" archive HEAD | tar -x -C "$work" --one-top-level=source
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "$torch" numpy
env -u CUDA_HOME PATH="$work/venv/bin:/usr/bin:/bin" pip install -q "$work/source"
cd "$work"
"$work/venv/bin/python" -m rfkernels info
"$work/venv/bin/python" - "$expected" <<'PY'
import sys
import torch
import rfkernels as rf

assert "source" not in rf.__file__, rf.__file__
assert sys.argv[1] in rf.explain_backends("cpu")["sdpa"]
outs = {}
for backend in rf.available_backends("cpu"):
    random = torch.Generator().manual_seed(0)
    with rf.use_backend(backend):
        cache = rf.EMASinkCache(num_layers=1, batch_size=1, num_kv_heads=2, head_dim=16, frame_tokens=4, sink_frames=2,
                                window_frames=3, rope=rf.Rope3D(16, 2, 2), dtype=torch.float32, device="cpu")
        for _ in range(6):
            cache.begin_chunk(2)
            q, k, v = (torch.randn(1, 8, 2, 16, generator=random, requires_grad=True) for _ in range(3))
            outs[backend] = rf.streaming_attention(q, k, v, cache[0])
        outs[backend].sum().backward()
        x, y, z = (torch.randn(1, 8, generator=random) for _ in range(3))
        rf.losses.ReDMDLoss()(x.requires_grad_(), y, z, None, torch.zeros(1)).backward()
torch.testing.assert_close(*outs.values())
print(f"works with torch {torch.__version__}: {list(outs)} agree, forward and backward")
PY
