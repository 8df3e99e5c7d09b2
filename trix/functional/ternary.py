"""Ternary quantisers with a straight-through gradient.

Source: absmean is the weight quantiser of BitNet b1.58 (Ma et al., 2024, arXiv:2402.17764, eq. 1-3), applied here per row
instead of per matrix; the straight-through estimator is Bengio et al., 2013 (arXiv:1308.3432).
"""

import torch
from torch import Tensor


def absmean_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Ternary codes and row scales of a weight, without gradient.

    scale[n] = mean_k |w[n, k]|;  code[n, k] = clip(round(w[n, k] / scale[n]), -1, 1)

    Args:
        weight: float [..., N, K].

    Returns:
        codes [..., N, K] in {-1, 0, +1} in the dtype of weight, and scale [..., N]. A row of zeros has codes 0 and the smallest
        positive scale of the dtype.
    """
    weight = weight.detach()
    scale = weight.abs().mean(dim=-1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)
    return (weight / scale).round_().clamp_(-1.0, 1.0), scale.squeeze(-1)


def weight_of_codes(codes: Tensor, scale: Tensor) -> Tensor:
    """A float weight of which :func:`absmean_codes` makes these codes and scales: scale * code * K / nnz, [..., N, K].

    mean |weight| of a row is then its scale again, and rounding gives the codes. A row without nonzero codes is 0, whatever
    its scale.

    Args:
        codes: [..., N, K] in {-1, 0, +1}, float. scale: positive [..., N].
    """
    density = codes.abs().mean(dim=-1, keepdim=True).clamp_min(1.0 / codes.shape[-1])
    return codes * scale.unsqueeze(-1) / density


def absmean_ternary(weight: Tensor) -> Tensor:
    """The value scale * code of :func:`absmean_codes`; its gradient passes straight through to ``weight`` [..., N, K]."""
    codes, scale = absmean_codes(weight)
    return straight_through(codes.mul_(scale.unsqueeze(-1)), weight)


def threshold_ternary(value: Tensor, threshold: float) -> Tensor:
    """sign(v) where |v| > threshold, else 0; the gradient passes straight through. Any shape.

    Raises:
        ValueError: threshold < 0.
    """
    if threshold < 0:
        raise ValueError(f"threshold ({threshold}) must be >= 0")
    detached = value.detach()
    # In place, the comparison writes numbers: on a CPU several times as fast as truth values.
    return straight_through(detached.abs().gt_(threshold).mul_(detached.sign()), value)


def straight_through(quantised: Tensor, value: Tensor) -> Tensor:
    """Forward ``quantised`` exactly; backward as if it were ``value``."""
    return _StraightThrough.apply(quantised, value)  # type: ignore[no-untyped-call]


class _StraightThrough(torch.autograd.Function):
    # value + (quantised - value).detach() would do, but its forward is off by a rounding: 0 and 1 would not stay 0 and 1.
    @staticmethod
    def forward(ctx: object, quantised: Tensor, value: Tensor) -> Tensor:
        del ctx
        return quantised.to(value.dtype).clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[None, Tensor]:
        del ctx
        return None, grad
