"""Losses of Re-DMD distillation, and the flow matching that they build on."""

from .flow import critic_loss, flow_matching_loss
from .redmd import ReDMDLoss, effective_sample_size, redmd_loss, reward_weights
from .schedule import FlowMatchSchedule

__all__ = [
    "FlowMatchSchedule",
    "ReDMDLoss",
    "critic_loss",
    "effective_sample_size",
    "flow_matching_loss",
    "redmd_loss",
    "reward_weights",
]
