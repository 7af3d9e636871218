"""The Re-DMD loss."""

from .redmd import ReDMDLoss, effective_sample_size, redmd_loss, reward_weights

__all__ = ["ReDMDLoss", "effective_sample_size", "redmd_loss", "reward_weights"]
