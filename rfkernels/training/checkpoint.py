"""Checkpoints from which a `ReDMDTrainer` goes on exactly."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ..models.checkpoints import save_weights
from ..models.wan import CausalWan
from .sharding import full, sharded_like
from .trainer import ReDMDTrainer

_NETWORKS = ("student", "critic", "ema")
_WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_trainer(trainer: ReDMDTrainer, folder: str | os.PathLike, extra: dict | None = None) -> None:
    """Writes ``student``, ``critic`` and ``ema`` as model folders (`rf.models.from_pretrained` reads them), and
    ``trainer.pt`` with optimisers, step, random states and ``extra`` (plain values, e.g. of a data loader).

    Sharded weights are gathered on rank 0, which writes; every rank calls this. The folder is replaced as a whole.
    """
    whole, options = _whole_states()
    weights = {
        "student": whole.get_model_state_dict(trainer.student, options=options),
        "critic": whole.get_model_state_dict(trainer.critic, options=options),
    }
    if trainer.ema is not None:
        weights["ema"] = {name: full(x).cpu() for name, x in trainer.ema.items()}
    state = {
        "step": trainer.step_index,
        "unfinished": trainer.unfinished is not None,
        "config": asdict(trainer.config),
        # Of one that has not stepped, torch would make up a state, with a step done.
        "optimizers": [
            whole.get_optimizer_state_dict(model, optimizer, options=options) if optimizer.state else None
            for model, optimizer in _optimizers(trainer)
        ],
        "random": _gather_objects(trainer, _random_state()),
        "extra": extra or {},
    }
    if trainer.rank == 0:
        folder = Path(folder)
        partial, old = (folder.with_name(f"{folder.name}.{kind}") for kind in ("partial", "old"))
        shutil.rmtree(partial, ignore_errors=True)
        for name, tensors in weights.items():
            save_weights(tensors, (trainer.critic if name == "critic" else trainer.student).config, partial / name)
        torch.save(state, partial / "trainer.pt")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            os.replace(folder, old)
        os.replace(partial, folder)
        shutil.rmtree(old, ignore_errors=True)
    if trainer.world > 1:
        dist.barrier()


def load_trainer(trainer: ReDMDTrainer, folder: str | os.PathLike) -> dict:
    """Takes a trainer of the same configuration back to where `save_trainer` was called; returns ``extra``.

    Raises:
        FileNotFoundError: no checkpoint there; ValueError: one of other settings, or of another model. The trainer is
            unchanged then.
    """
    folder = Path(folder)
    if not (folder / "trainer.pt").is_file():
        raise FileNotFoundError(f"{folder} must hold a trainer.pt")
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    own = asdict(trainer.config)
    # A longer run is the same run.
    other = {k: v for k, v in state["config"].items() if k != "total_steps" and own.get(k, v) != v}
    if other:
        raise ValueError(f"{folder} was trained with {other}, this trainer has { {k: own[k] for k in other} }")
    weights = {name: load_file(folder / name / _WEIGHTS) for name in _NETWORKS if (folder / name).is_dir()}
    for name, tensors in weights.items():
        expected = (trainer.critic if name == "critic" else trainer.student).state_dict()
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in expected.items()}:
            raise ValueError(f"{folder / name} must hold the {name}'s weights, got those of another model")
    whole, options = _whole_states()
    whole.set_model_state_dict(trainer.student, weights["student"], options=options)
    whole.set_model_state_dict(trainer.critic, weights["critic"], options=options)
    for (model, optimizer), saved in zip(_optimizers(trainer), state["optimizers"], strict=True):
        if saved is None:
            optimizer.state.clear()
        else:
            whole.set_optimizer_state_dict(model, optimizer, saved, options=options)
    trainer.ema = None
    if "ema" in weights:
        own_weights = trainer.weights.items()
        trainer.ema = {name: sharded_like(weights["ema"][name], p.detach().float()) for name, p in own_weights}
    trainer.step_index = state["step"]
    trainer.unfinished = {} if state["unfinished"] else None
    if trainer.rank < len(state["random"]):
        _set_random_state(state["random"][trainer.rank])
    return state["extra"]


def _whole_states() -> tuple[ModuleType, Any]:
    """torch's functions for state dicts that are gathered from all ranks, and the options that ask for that."""
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def _optimizers(trainer: ReDMDTrainer) -> tuple[tuple[CausalWan, torch.optim.Optimizer], ...]:
    return (trainer.student, trainer.optimizer), (trainer.critic, trainer.critic_optimizer)


def _random_state() -> dict:
    """Of torch's global generators, for rewards and decoders that draw; the trainer's own numbers have no state."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _gather_objects(trainer: ReDMDTrainer, value: Any) -> list[Any]:
    if trainer.world == 1:
        return [value]
    everyone: list[Any] = [None] * trainer.world
    dist.all_gather_object(everyone, value)
    return everyone
