"""No row is timed whose result is wrong: at most twice the error of plain PyTorch in the same dtype, plus a rounding
band of the result's dtype."""

from __future__ import annotations

import torch

Results = dict[str, torch.Tensor]


def wrong(got: Results, exact: Results, plain: Results) -> str | None:
    """Why results are not right, or None. got may hold some of exact's tensors; plain errs as it may.

    exact: float64. Tensors that plain lacks have the rounding band alone.
    """
    if not got or not set(got) <= set(exact):
        return f"nothing to compare: got {sorted(got)}, expected some of {sorted(exact)}"
    for name, value in got.items():
        want = exact[name]
        if value.shape != want.shape:
            return f"{name} has shape {tuple(value.shape)} instead of {tuple(want.shape)}"
        error = (value.double() - want).abs().max().item()
        usual = (plain[name].double() - want).abs().max().item() if name in plain else 0.0
        band = torch.finfo(value.dtype).eps * want.abs().max().item()
        if not error <= 2 * usual + band:  # NaN is wrong too
            return f"{name} is off by {error:.3g}, allowed {2 * usual + band:.3g}"
    return None
