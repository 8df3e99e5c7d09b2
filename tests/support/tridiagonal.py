"""Random tridiagonal operators, and their dense matrices as a reference for the recurrences."""

import torch
from torch import Tensor

from trix.functional.resolvent import Pair


def random_operator(
    *shape: int, eta: float = 1e-3, spikes: float = 0.0, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Pair, Pair, Tensor]:
    """alpha, c and w = |c|^2 of the given shape [..., N]; a few entries of alpha are as large as spikes."""
    generator = torch.Generator().manual_seed(seed)
    a, c_re, c_im = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    a = torch.where(torch.rand(shape, generator=generator) < 0.05, spikes or a, a)
    c = Pair(c_re.to(dtype), c_im.to(dtype))
    return Pair(a.to(dtype), torch.full(shape, -eta, dtype=dtype)), c, c.re.square() + c.im.square()


def dense(alpha: Pair, c: Pair) -> Tensor:
    """The matrix with diagonal alpha, sub-diagonal c_1, c_2, ... and its conjugate above: complex [..., N, N]."""
    c_after = torch.complex(c.re, c.im)[..., 1:]
    below, above = torch.diag_embed(c_after, -1), torch.diag_embed(c_after.conj(), 1)
    return torch.diag_embed(torch.complex(alpha.re, alpha.im)) + below + above


def relative_error(found: Pair, expected: Tensor) -> float:
    return ((torch.complex(*found) - expected).abs() / expected.abs().clamp_min(1e-300)).max().item()


def tokens(pair: Pair, part: slice) -> Pair:
    """A part of the tokens of [..., N]."""
    return Pair(pair.re[..., part], pair.im[..., part])
