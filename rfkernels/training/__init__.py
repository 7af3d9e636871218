"""Training of few-step causal students: rollouts, initialisation from a teacher, and the Re-DMD step."""

from .checkpoint import load_trainer, save_trainer
from .config import ReDMDConfig
from .guidance import guided_flow, predict_clean
from .ode import collect_trajectories, ode_regression_loss
from .rollout import Rollout, SelfForcingRollout
from .sharding import shard
from .trainer import ReDMDTrainer

__all__ = [
    "ReDMDConfig",
    "ReDMDTrainer",
    "Rollout",
    "SelfForcingRollout",
    "collect_trajectories",
    "guided_flow",
    "load_trainer",
    "ode_regression_loss",
    "predict_clean",
    "save_trainer",
    "shard",
]
