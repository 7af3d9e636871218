"""What importing the package loads, and what it can do without."""

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


STREAMS = """
cache = rf.EMASinkCache(num_layers=1, batch_size=1, num_kv_heads=2, head_dim=16, frame_tokens=4, sink_frames=1,
                        window_frames=2, dtype=torch.float32)
for _ in range(4):
    cache.begin_chunk(1)
    q, k, v = (torch.randn(1, 4, 2, 16) for _ in range(3))
    out = rf.streaming_attention(q, k, v, cache[0])
assert out.isfinite().all()
"""


def test_models_losses_and_training_are_imported_at_first_use():
    run(
        "import sys, torch, rfkernels as rf\n"
        "late = ['models', 'losses', 'training', 'integrations', 'tools', 'draws']\n"
        "loaded = [name for name in late if f'rfkernels.{name}' in sys.modules]\n"
        "assert not loaded, loaded\n"
        "assert set(['models', 'losses', 'training', 'integrations']) <= set(dir(rf))\n"
        "assert rf.losses.ReDMDLoss and rf.models.CausalWan and rf.training.ReDMDTrainer\n"
        "assert 'rfkernels.models.video' not in sys.modules and 'video' in dir(rf.models)\n"
        "assert rf.models.video.StreamingDecoder and rf.models.encode_prompts\n"
        "assert 'self_forcing' in dir(rf.integrations) and 'rfkernels.integrations.self_forcing' not in sys.modules\n"
        "assert rf.integrations.self_forcing.patch\n"
        "assert 'diffusers' in dir(rf.integrations) and rf.integrations.diffusers.stream\n"
        "assert 'diffusers' not in sys.modules and 'transformers' not in sys.modules\n"
    )


def test_the_ops_load_nothing_distributed():
    """torch itself imports some of torch.distributed; FSDP2 and DTensor are the training's."""
    code = "import sys, torch\nbefore = set(sys.modules)\n{}new = sorted(set(sys.modules) - before)\nprint(*new)"
    new = run(code.format("import rfkernels\n")).split()
    assert not [name for name in new if name.startswith(("torch.distributed", "torch._dynamo", "triton"))], new
    assert len([name for name in new if not name.startswith("rfkernels")]) < 25, new


def test_works_where_torch_distributed_is_missing():
    """As in builds with USE_DISTRIBUTED=0: streaming, losses, models and a rollout of the student."""
    run(
        "import sys, torch\n"
        "torch.distributed.is_available = lambda: False\n"
        "for name in [n for n in sys.modules if n.startswith('torch.distributed.')]: del sys.modules[name]\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.startswith('torch.distributed.') or name == 'torch._C._distributed_c10d':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "import rfkernels as rf\n" + STREAMS + "assert rf.losses.ReDMDLoss and rf.models.StreamingSampler\n"
        "from rfkernels.training import SelfForcingRollout, ReDMDTrainer, save_trainer\n"
    )
