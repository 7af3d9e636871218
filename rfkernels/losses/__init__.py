"""Losses of Re-DMD distillation."""

from .redmd import ReDMDLoss, redmd_loss

__all__ = ["ReDMDLoss", "redmd_loss"]
