"""Checkpoints from which a `ReDMDTrainer` goes on exactly.

The folders of the networks are whole, plain models, for use. Where a network has adapters these are merged there, so
that ``trainer.pt`` has what a resumed run needs besides. Names are the plain model's (`plain_name`): a run of a
compiled student goes on without compilation, and the other way round.
"""

from __future__ import annotations

import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from ..models.checkpoints import save_weights
from ..models.wan import CausalWan
from ..models.wrappers import full, own_keys, plain_name, plain_state, sharded_like
from .trainer import ReDMDTrainer

_WEIGHTS = "diffusion_pytorch_model.safetensors"
# What may differ in a run that goes on. The betas are not among them: the optimisers' moments were averaged with them.
_FREE = ("total_steps", "lr", "critic_lr", "weight_decay", "max_grad_norm", "max_weight", "ema_decay")

Tensors = dict[str, torch.Tensor]


def save_trainer(trainer: ReDMDTrainer, folder: str | os.PathLike[str], extra: dict[str, Any] | None = None) -> None:
    """Writes ``student``, ``critic`` and ``ema`` as model folders (`rf.models.from_pretrained` reads them), and
    ``trainer.pt`` with optimisers, step, random states and ``extra`` (plain values, e.g. of a data loader).

    Sharded weights are gathered on rank 0, which writes; every rank calls this. The folder is replaced as a whole.

    Raises:
        ValueError: ``extra`` that could not be read back. Nothing is replaced then.
    """
    whole, options = _whole_states()
    weights = {
        name: _named(whole.get_model_state_dict(model, options=options)) for name, model in _networks(trainer).items()
    }
    average = None if trainer.ema is None else {name: full(x).cpu() for name, x in trainer.ema.items()}
    state = {
        "step": trainer.step_index,
        "unfinished": trainer.unfinished is not None,
        "config": _plain(asdict(trainer.config)),
        # Of one that has not stepped, torch would make up a state, with a step done.
        "optimizers": [
            _renamed_moments(whole.get_optimizer_state_dict(model, optimizer, options=options), plain_name)
            if optimizer.state
            else None
            for model, optimizer in _optimizers(trainer)
        ],
        "random": _gather_objects(trainer, _random_state()),
        "extra": extra or {},
    }
    if trainer.rank == 0:
        if average is not None:
            # A whole model: what is frozen, and so not averaged, is the student's.
            weights["ema"] = {name: x.float() for name, x in weights["student"].items()} | average
        _write(trainer, Path(folder), weights, state)
    if trainer.world > 1:
        dist.barrier()


def _write(trainer: ReDMDTrainer, folder: Path, weights: dict[str, Tensors], state: dict[str, Any]) -> None:
    partial, old = _beside(folder)
    shutil.rmtree(partial, ignore_errors=True)
    state["adapters"] = {}
    for name, tensors in weights.items():
        model = trainer.critic if name == "critic" else trainer.student
        own = plain_state(model, tensors)
        save_weights(own, model.config, partial / name)
        state["adapters"][name] = {key: x for key, x in tensors.items() if own.get(key) is not x}
    try:
        torch.save(state, partial / "trainer.pt")
        torch.load(partial / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    except (pickle.PickleError, AttributeError, TypeError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(f"extra must be plain values and tensors, which load with weights_only: {error}") from error
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path) -> tuple[Path, Path]:
    """Where a checkpoint is written, and where the one before it is meanwhile."""
    return folder.with_name(f"{folder.name}.partial"), folder.with_name(f"{folder.name}.old")


def recover(folder: str | os.PathLike) -> bool:
    """Whether there is a checkpoint, finishing a `save_trainer` that was stopped between its two renamings."""
    folder = Path(folder)
    partial, old = _beside(folder)
    if not folder.exists() and old.exists() and partial.exists():
        os.replace(partial, folder)  # which was complete, or the old one had not been moved
    return (folder / "trainer.pt").is_file()


def load_trainer(trainer: ReDMDTrainer, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Takes a trainer of the same configuration back to where `save_trainer` was called; returns ``extra``.

    total_steps, lr, critic_lr, weight_decay, max_grad_norm, max_weight and ema_decay may differ; the trainer's own hold
    from here on.

    Raises:
        FileNotFoundError: no checkpoint there; ValueError: one of other settings, or of another model. The trainer is
            unchanged then.
    """
    folder = Path(folder)
    if not recover(folder):
        raise FileNotFoundError(f"{folder} must hold a trainer.pt")
    state = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    changed = _changed_settings(trainer, folder, state["config"])
    weights = _read(trainer, folder, state.get("adapters", {}))
    _check_trained(trainer, folder, state["optimizers"])
    whole, options = _whole_states()
    for name, model in _networks(trainer).items():
        names = _torch_names(whole, model)
        own = {fqn: weights[name][plain] for plain, fqn in names.items()}
        whole.set_model_state_dict(model, own, options=options)
    for (model, optimizer), saved in zip(_optimizers(trainer), state["optimizers"], strict=True):
        if saved is None:
            optimizer.state.clear()
        else:
            moments = _renamed_moments(saved, _torch_names(whole, model).__getitem__)
            whole.set_optimizer_state_dict(model, optimizer, moments, options=options)
        rate = "critic_lr" if optimizer is trainer.critic_optimizer else "lr"
        for name, setting in (("lr", rate), ("weight_decay", "weight_decay")):
            if setting in changed:
                for group in optimizer.param_groups:
                    group[name] = getattr(trainer.config, setting)
    trainer.ema = None
    if "ema" in weights:
        trainer.ema = {
            name: sharded_like(weights["ema"][name], p.detach().float()) for name, p in trainer.weights.items()
        }
    trainer.step_index = state["step"]
    trainer.unfinished = {} if state["unfinished"] else None
    if trainer.rank < len(state["random"]):
        _set_random_state(state["random"][trainer.rank])
    return state["extra"]


# --- whether a checkpoint fits ----------------------------------------------------------------------------------------


def _changed_settings(trainer: ReDMDTrainer, folder: Path, saved: dict[str, Any]) -> set[str]:
    """The settings in which the trainer differs from the checkpoint, all of which may."""
    own, saved = _plain(asdict(trainer.config)), _plain(saved)
    changed = {name for name, value in saved.items() if own.get(name, value) != value}
    other = sorted(changed.difference(_FREE))
    if other:
        theirs, ours = ({name: x[name] for name in other} for x in (saved, own))
        raise ValueError(f"{folder} was trained with {theirs}, this trainer has {ours}")
    return changed


def _read(trainer: ReDMDTrainer, folder: Path, adapters: dict[str, Tensors]) -> dict[str, Tensors]:
    """The weights of each network by name: of the average those that are trained, of the others all."""
    weights = {}
    for name in ("student", "critic", "ema"):
        if not (folder / name).is_dir():
            continue
        model = trainer.critic if name == "critic" else trainer.student
        whole = {plain_name(key): x for key, x in model.state_dict().items()}
        wanted = trainer.weights if name == "ema" else whole
        held = load_file(folder / name / _WEIGHTS) | adapters.get(name, {})
        known = {*whole, *own_keys(model)}
        found = {key: held[key].shape for key in wanted if key in held}
        if found != {key: x.shape for key, x in wanted.items()} or not known.issuperset(held):
            raise ValueError(f"{folder / name} must hold the {name}'s weights, got those of another model")
        weights[name] = held
    return weights


def _check_trained(trainer: ReDMDTrainer, folder: Path, optimizers: list[dict | None]) -> None:
    for name, own, saved in zip(
        ("student", "critic"), (trainer.weights, trainer.critic_weights), optimizers, strict=True
    ):
        held = set(own) if saved is None else {key for group in saved["param_groups"] for key in group["params"]}
        other = sorted(held.symmetric_difference(own))
        if other:
            raise ValueError(
                f"the {name} must train the weights that it trained in {folder}: "
                f"{len(other)} are frozen in one of them only, such as {other[0]}"
            )


def _plain(value: Any) -> Any:
    """Settings as lists and Python's own numbers, which can be compared and load with ``weights_only``."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if hasattr(value, "tolist"):  # tensors; NumPy's arrays and numbers
        return value.tolist()
    return [_plain(x) for x in value] if isinstance(value, list | tuple) else value


# --- torch's state dicts ----------------------------------------------------------------------------------------------


def _whole_states() -> tuple[ModuleType, Any]:
    """torch's functions for state dicts that are gathered from all ranks, and the options that ask for that."""
    from torch.distributed.checkpoint import state_dict

    return state_dict, state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True)


def _named(state: Tensors) -> Tensors:
    return {plain_name(name): x for name, x in state.items()}


def _torch_names(whole: ModuleType, model: nn.Module) -> dict[str, str]:
    """What torch's functions call each weight, by its plain name: they leave out some wrappers' names only."""
    return {plain_name(name): name for name in whole.get_model_state_dict(model)}


def _renamed_moments(state: dict[str, Any], renamed: Any) -> dict[str, Any]:
    """An optimiser's state dict with other names of the weights; of ranks other than the first it is empty."""
    if not state:
        return {}
    return {
        "state": {renamed(name): x for name, x in state["state"].items()},
        "param_groups": [g | {"params": [renamed(name) for name in g["params"]]} for g in state["param_groups"]],
    }


def _networks(trainer: ReDMDTrainer) -> dict[str, CausalWan]:
    return {"student": trainer.student, "critic": trainer.critic}


def _optimizers(trainer: ReDMDTrainer) -> tuple[tuple[CausalWan, torch.optim.Optimizer], ...]:
    return (trainer.student, trainer.optimizer), (trainer.critic, trainer.critic_optimizer)


def _random_state() -> dict[str, Any]:
    """Of torch's global generators, for rewards and decoders that draw; the trainer's own numbers have no state."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _gather_objects(trainer: ReDMDTrainer, value: Any) -> list[Any]:
    if trainer.world == 1:
        return [value]
    everyone: list[Any] = [None] * trainer.world
    dist.all_gather_object(everyone, value)
    return everyone
