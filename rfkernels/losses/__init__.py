"""Losses of Re-DMD distillation."""

from .redmd import ReDMDLoss, redmd_loss
from .schedule import FlowMatchSchedule

__all__ = ["FlowMatchSchedule", "ReDMDLoss", "redmd_loss"]
