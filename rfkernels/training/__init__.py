"""Training of few-step causal students: rollouts, initialisation from a teacher, and the Re-DMD step."""

from .ode import collect_trajectories, ode_regression_loss
from .rollout import Rollout, SelfForcingRollout

__all__ = ["Rollout", "SelfForcingRollout", "collect_trajectories", "ode_regression_loss"]
