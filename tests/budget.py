"""The error budget: twice what plain PyTorch loses in the same dtype, plus one rounding band."""

from __future__ import annotations

import torch


def check(
    got: torch.Tensor,
    exact: torch.Tensor,
    plain: torch.Tensor,
    what: str = "",
    least: float = 0.0,
    dtype: torch.dtype | None = None,
    cancelled: float = 0.0,
) -> None:
    """exact: float64; plain: what plain PyTorch gives in ``got``'s dtype. Infinities and NaN must match exactly.

    dtype: whose rounding band counts, where ``got`` is stored wider. least: the magnitude below which the band does not
    shrink. A normaliser has 1: rounding the sum of exponentials by a relative eps moves its logarithm by an absolute
    eps, however small the logarithm. cancelled: the magnitude of sums in float32 whose difference this is, and which is
    therefore no more exact than they are; it counts by float32's eps, so in half precision hardly at all.
    """
    value, exact, plain = got.detach().cpu().double(), exact.detach().cpu().double(), plain.detach().cpu().double()
    for kind in (torch.isposinf, torch.isneginf, torch.isnan):
        assert torch.equal(kind(value), kind(exact)), f"{what}: {kind.__name__} at other places"
    finite = exact.isfinite()
    if not finite.any():
        return
    error = torch.where(finite, (value - exact).abs(), 0)
    plain_error = (plain - exact)[finite & plain.isfinite()].abs().max().item() if finite.any() else 0.0
    band = torch.finfo(dtype or got.dtype).eps * max(least, exact[finite].abs().max().item())
    band = max(band, torch.finfo(torch.float32).eps * cancelled)
    worst = error.argmax()
    at = tuple(int(i) for i in torch.unravel_index(worst, error.shape))
    allowed = 2 * plain_error + band
    assert error.max().item() <= allowed, (
        f"{what}: error {error.max().item():.3e} at {at} (got {value[at].item():.6g}, exact {exact[at].item():.6g}), "
        f"allowed {allowed:.3e} = 2 * {plain_error:.3e} + {band:.3e}"
    )


def check_unbiased(got: torch.Tensor, exact: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """In a half type: many numbers rounded to the nearest are as long as the exact ones; truncated, a third of a unit
    shorter."""
    value, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    known = exact.isfinite()
    length = exact[known].square().sum().item()
    if known.sum() < 256 or length == 0 or dtype.itemsize > 2:
        return  # too few to average out, or no more exact than what all of them are multiplied by
    longer = (value[known] * exact[known]).sum().item() / length - 1
    assert abs(longer) <= torch.finfo(dtype).eps / 8, f"{what}: longer than it should be by a part of {longer:.2e}"


def check_sums_are_wide(got: torch.Tensor, exact: torch.Tensor, what: str, dtype: torch.dtype) -> None:
    """Of products of factors in a half type, summed over many keys or queries: the root mean square of the error.

    The result's rounding is 0.2 eps of it and that of the factors as much: 0.31 together. Sums that are rounded to the
    half type after each of six tiles come to 0.47, after each of 24 to 0.78.
    """
    value, exact = got.detach().cpu().double(), exact.detach().cpu().double()
    error = ((value - exact).square().mean() / exact.square().mean()).sqrt() / torch.finfo(dtype).eps
    assert error <= 0.4, f"{what}: an error of {error:.2f} eps on average"
