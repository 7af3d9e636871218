"""A small `ReDMDTrainer`, whole or, run by torchrun, one rank of a sharded one."""

import sys
import warnings

import torch
from test_model import small

from rfkernels.training import ReDMDConfig, ReDMDTrainer, save_trainer, shard

CONFIG = dict(
    num_frames=5, height=4, width=6, chunk_frames=2, first_chunk_frames=1, sink_frames=1, window_frames=3, alpha=0.5,
    grad_frames=4, steps=(1000, 500), generator_every=2, ema_start=1, ema_decay=0.9, lr=1e-3, critic_lr=1e-3,
)  # fmt: skip


SHARDED = dict(num_frames=3, grad_frames=2, generator_every=1, ema_start=0, normalize_weights=True)


def brightness(frames, prompts):
    assert not frames.requires_grad and len(prompts) == len(frames)
    return frames.mean((1, 2, 3, 4))


def make(
    device="cpu", dtype=torch.float64, reward=brightness, wrap=lambda model: model, checkpointing=False, **changes
):
    models = []
    for seed in range(3):
        torch.manual_seed(seed)
        models.append(wrap(small(device, dtype, num_layers=1, checkpointing=checkpointing)))
    torch.manual_seed(9)
    uncond = torch.randn(1, 3, 16, dtype=torch.float64).to(device, dtype)
    return ReDMDTrainer(*models, uncond, reward, torch.sigmoid, ReDMDConfig(**CONFIG | changes))


def batches(step, sizes=(1, 1, 1, 1), device="cpu", dtype=torch.float64):
    context = torch.randn(sum(sizes), 3, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return [(c.to(device, dtype), ["prompt"] * len(c)) for c in context.split(list(sizes))]


def main(folder):
    import torch.distributed as dist

    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="FSDP2-wrapped module")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    trainer = make(wrap=shard, accumulation=2, checkpointing=True, **SHARDED)
    for step in range(2):
        metrics = trainer.step(batches(step)[rank::2])  # rank r has samples r, 2 + r: as if they were all in one batch
    save_trainer(trainer, f"{folder}/sharded", {"seen": 2})
    bad = trainer.student.state_dict()["head.head.bias"].full_tensor()
    trainer.reward = lambda frames, _: frames.new_full((1,), torch.nan if rank == 1 else 0.0)
    try:
        trainer.step(batches(2)[rank::2])
    except ValueError as error:
        assert "reward must be finite" in str(error)
        assert torch.equal(bad, trainer.student.state_dict()["head.head.bias"].full_tensor())
        stopped = 1
    if rank == 0:
        torch.save({name: x.tolist() for name, x in metrics.items()} | {"stopped": stopped}, f"{folder}/metrics.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
