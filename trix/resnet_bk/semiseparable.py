"""Matrices that are tridiagonal plus low rank: N (3 + 2r) numbers in place of N^2.

Legend: N sequence, r rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_banded
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_SWEEPS = 100
SLOW = 0.99  # a sweep that leaves more than this part of the error is the last


class _Factors(NamedTuple):
    """H = tridiagonal + U V^T. below[i] couples row i + 1 to column i, above[i] row i to column i + 1."""

    below: Tensor
    diagonal: Tensor
    above: Tensor
    U: Tensor
    V: Tensor


class SemiseparableMatrix:
    """H ~ T + U V^T, T tridiagonal, U and V [N, r]. Only the three diagonals, U and V are kept.

    :meth:`factorize` finds them by masked iteration: what T will cover is unknown to the low-rank part, so the band is filled
    with the low-rank part's own values, the truncated SVD taken again, until the rest, which is the error, stands still. Then
    T = tri(H - U V^T).

    Theorem: the product costs O(N r), the memory is N (3 + 2r) numbers.
    Measured: where H is exactly of that form with rank 5, N = 128, the relative error is below 1e-12; a plain SVD of H less its
    band leaves .05.
    Claimed by the interface that this follows, and false: that any matrix factorises so. randn(512, 512) with the default rank
    of 9 keeps a relative error of .96: :attr:`relative_error` tells.
    A U V^T is not causal: row i reads every column. It is for encoders and analysis.

    Args:
        n_seq: N. rank: r, by default ceil(log2 N), at least 1.

    Attributes:
        relative_error: |H - T - U V^T| / |H| (Frobenius) of the last :meth:`factorize`. num_sweeps: how many SVDs it took.

    Raises:
        ValueError: n_seq < 1; rank outside [1, n_seq]; a product before :meth:`factorize`; shapes that do not fit.
    """

    def __init__(self, n_seq: int, rank: int | None = None) -> None:
        if n_seq < 1:
            raise ValueError(f"n_seq ({n_seq}) must be >= 1")
        rank = max((n_seq - 1).bit_length(), 1) if rank is None else rank
        if not 1 <= rank <= n_seq:
            raise ValueError(f"rank ({rank}) must be >= 1 and <= n_seq ({n_seq})")
        self.n_seq, self.rank = n_seq, rank
        self.relative_error: float | None = None
        self.num_sweeps = 0
        self._factors: _Factors | None = None

    @torch.no_grad()
    def factorize(self, H: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """T [N, N], U [N, r] and V [N, r] with T + U V^T ~ H, in the dtype of H, at least float32.

        The low-rank part first gets the rank of H's corners beyond the band, as a rank higher than that of an exact H would
        converge slowly; where that leaves an error, r. The columns of U and V that are left over are 0. T is returned dense,
        for the interface, and not kept.

        Raises:
            ValueError: H of another shape, complex, of integers, or not finite.
        """
        if H.shape != (self.n_seq, self.n_seq) or not H.is_floating_point():
            raise ValueError(f"H {tuple(H.shape)} {H.dtype} must be float {(self.n_seq, self.n_seq)}")
        if not bool(H.isfinite().all()):
            raise ValueError(f"H ({float(H[~H.isfinite()][0])}) must be finite")
        H = H.to(torch.promote_types(H.dtype, torch.float32))
        size, is_band = float(H.norm()), torch.ones_like(H, dtype=torch.bool).tril(1).triu(-1)
        tolerance = self.n_seq * torch.finfo(H.dtype).eps * size
        best, self.num_sweeps = _LowRank(H[:, :0], H[:, :0], size, 0), 0
        for rank in sorted({min(self.rank, _corner_rank(H)), self.rank}):
            if best.error > tolerance:
                found = _masked_svd(H, is_band, rank, tolerance)
                self.num_sweeps += found.num_sweeps
                best = min(best, found, key=lambda one: one.error)
        T = torch.where(is_band, H - best.U @ best.V.mT, 0.0)
        self.relative_error = best.error / size if size else 0.0
        U, V = (torch.nn.functional.pad(factor, (0, self.rank - factor.shape[1])) for factor in (best.U, best.V))
        self._factors = _Factors(T.diagonal(-1).clone(), T.diagonal().clone(), T.diagonal(1).clone(), U, V)
        return T, U, V

    def matvec(self, x: Tensor) -> Tensor:
        """y = T x + U (V^T x) in O(N r), differentiable in x. x: float [..., N] -> [..., N]."""
        below, diagonal, above, U, V = self._of("matvec")
        self._check_last("x", x)
        y = diagonal * x + (x @ V) @ U.mT
        y = y + torch.nn.functional.pad(below * x[..., :-1], (1, 0))
        return y + torch.nn.functional.pad(above * x[..., 1:], (0, 1))

    def inverse_diagonal(self, z: complex) -> Tensor:
        """The diagonal of (T + U V^T - z)^-1 by Woodbury's identity, with 2r tridiagonal solves: complex128 [N].

        A = (T - z)^-1: diag A - sum over columns of (A U (1 + V^T A U)^-1) * (A^T V). Not differentiable.

        Raises:
            ValueError: Im z <= 0.
        """
        below, diagonal, above, U, V = (factor.to(torch.complex128).cpu().numpy() for factor in self._of("inverse_diagonal"))
        if not z.imag > 0:
            raise ValueError(f"Im z ({z.imag}) must be > 0")
        shifted = diagonal - z
        band = np.stack([np.pad(above, (1, 0)), shifted, np.pad(below, (0, 1))])
        transposed = np.stack([np.pad(below, (1, 0)), shifted, np.pad(above, (0, 1))])
        AU, AtV = solve_banded((1, 1), band, U), solve_banded((1, 1), transposed, V)
        correction = np.linalg.solve((np.eye(self.rank) + V.T @ AU).T, AU.T).T
        return torch.from_numpy(_tridiagonal_inverse_diagonal(shifted, below * above) - (correction * AtV).sum(axis=1))

    def checkpoint_recompute(self, x: Tensor, k: int = 4, *, function: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """function(H x), H along the sequence; the function runs in k segments, each computed again in the backward pass.

        So what the function keeps for its backward is never held for more than one segment. Measured: of a hidden layer of four
        times the width, with GELU, less than a third is kept. Without a function there is nothing to gain: the product is
        linear, and keeps nothing of x.

        Args:
            x: float [B, N, D]. k: segments. function: [B, n, D] to [B, n, any width], token by token; None is the identity.

        Raises:
            ValueError: k < 1, or x of another shape.
        """
        if x.ndim != 3:
            raise ValueError(f"x {tuple(x.shape)} must be [batch, sequence, width]")
        if k < 1:
            raise ValueError(f"k ({k}) must be >= 1")
        y = self.matvec(x.mT).mT
        if function is None:
            return y
        return torch.cat([checkpoint(function, part, use_reentrant=False) for part in y.chunk(k, dim=1)], dim=1)

    def _of(self, what: str) -> _Factors:
        if self._factors is None:
            raise ValueError(f"factorize must be called before {what}")
        return self._factors

    def _check_last(self, name: str, x: Tensor) -> None:
        if x.ndim == 0 or x.shape[-1] != self.n_seq:
            raise ValueError(f"sequence of {name} {tuple(x.shape)} must be n_seq ({self.n_seq})")


class _LowRank(NamedTuple):
    U: Tensor
    V: Tensor
    error: float
    num_sweeps: int


def _masked_svd(H: Tensor, is_band: Tensor, rank: int, tolerance: float) -> _LowRank:
    """U, V [N, rank], the Frobenius error of their product outside the band, and the number of SVDs."""
    found = _LowRank(H[:, :0], H[:, :0], float(H.masked_fill(is_band, 0.0).norm()), 0)
    while found.num_sweeps < MAX_SWEEPS:
        before = found
        left, value, right = torch.linalg.svd(torch.where(is_band, before.U @ before.V.mT, H), full_matrices=False)
        U, V = left[:, :rank] * value[:rank], right[:rank].mT
        error = float((H - U @ V.mT).masked_fill(is_band, 0.0).norm())
        found = _LowRank(U, V, error, before.num_sweeps + 1)
        if error <= tolerance or error > SLOW * before.error:
            break
    return found


def _corner_rank(H: Tensor) -> int:
    """The numerical rank of the larger corners beyond the band, which no tridiagonal part reaches; 0 where there are none."""
    half = len(H) // 2
    corners = [H[half + 1 :, :half], H[:half, half + 1 :]]
    return max((int(torch.linalg.matrix_rank(corner)) for corner in corners if corner.numel()), default=0)


def _tridiagonal_inverse_diagonal(diagonal: np.ndarray, w: np.ndarray) -> np.ndarray:
    """1 / (diagonal_i - w_{i-1} L_{i-1} - w_i R_{i+1}), with the pivots L from the left and R from the right.

    Not by :func:`~trix.functional.resolvent.two_sided_diagonal`, as the couplings w of a factorised matrix may be negative.
    """
    left, right = _pivots(diagonal, w), _pivots(diagonal[::-1], w[::-1])[::-1]
    pull = np.zeros_like(diagonal)
    pull[1:] += w * left[:-1]
    pull[:-1] += w * right[1:]
    return 1.0 / (diagonal - pull)


def _pivots(diagonal: np.ndarray, w: np.ndarray) -> np.ndarray:
    pivots, last = np.empty_like(diagonal), 0.0
    for i, (value, coupling) in enumerate(zip(diagonal, np.pad(w, (1, 0)), strict=True)):
        last = 1.0 / (value - coupling * last)
        pivots[i] = last
    return pivots
