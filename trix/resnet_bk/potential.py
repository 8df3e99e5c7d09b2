"""The prime-bump potential: bumps at the logarithms of prime powers.

Legend: B batch, N sequence, D model width.
"""

import math
from typing import Literal, get_args

import torch
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

from trix.functional.resolvent import check_choice
from trix.resnet_bk.statistics import spacing_statistics

REACH = 9.0  # widths of a bump beyond which it is below float64's rounding
BLOCK = 64  # bumps at a time

Positions = Literal["uniform", "index", "log1p"]


class PrimeBumpPotential(nn.Module):
    """V_j = scale * sum over primes p < n_seq and k <= k_max of alpha_{p,k} psi(x_j - k log p), plus a learned part of x.

    alpha_{p,k} = log p / p^{k (1/2 + epsilon)}; psi(x) = epsilon^{-1/2} exp(-x^2 / (2 epsilon)), whose integral is sqrt(2 pi)
    for every epsilon.

    Claimed by the interface that this follows, and false: that the eigenvalues of the lattice operator with this potential are
    spaced as those of GUE. A potential that is smooth on the lattice leaves the spacings of a free particle in a box, a picket
    fence. Measured by :meth:`verify_gue_statistics` with n_seq = 2600, epsilon = 1: mean gap ratio .955 (GUE .600), distance to
    GUE .48, to Poisson .58: closest to none.

    Args:
        n_seq: longest sequence. epsilon: squared width of a bump, and the decay of its height with p. k_max: highest power.
        scale: factor of the fixed potential.
        positions: x_j. "uniform": from 0 to log n_seq in equal steps; "index": j; "log1p": log(1 + j).
        d_model: width of x for the learned part, a linear map to one number, 0 at first. None: the potential is the fixed one,
            and of x only the shape matters.

    Shape:
        x: float [B, N, D], N <= n_seq -> [B, N] in the dtype of x, at least float32.

    Raises:
        ValueError: n_seq < 1, k_max < 1, epsilon <= 0, a scale that is not finite, other positions; N > n_seq, N = 0, an x of
            another number of dimensions, of integers, or of another width than d_model.
    """

    bump: Tensor

    def __init__(
        self,
        n_seq: int,
        epsilon: float = 1.0,
        k_max: int = 3,
        *,
        scale: float = 1.0,
        positions: Positions = "uniform",
        d_model: int | None = None,
    ) -> None:
        super().__init__()
        if n_seq < 1 or k_max < 1:
            raise ValueError(f"n_seq ({n_seq}) and k_max ({k_max}) must be >= 1")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon ({epsilon}) must be > 0 and finite")
        if not math.isfinite(scale):
            raise ValueError(f"scale ({scale}) must be finite")
        check_choice("positions", positions, get_args(Positions))
        self.n_seq, self.epsilon, self.k_max, self.scale = n_seq, epsilon, k_max, scale
        self.positions: Positions = positions
        self.register_buffer("bump", self._bumps(), persistent=False)
        self.projection = None if d_model is None else nn.Linear(d_model, 1)
        if self.projection is not None:
            nn.init.zeros_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)

    def _place(self) -> Tensor:
        if self.positions == "uniform":
            return torch.linspace(0.0, math.log(self.n_seq), self.n_seq, dtype=torch.float64)
        index = torch.arange(self.n_seq, dtype=torch.float64)
        return index if self.positions == "index" else index.log1p()

    def _bumps(self) -> Tensor:
        """The fixed potential without the scale: float64 [n_seq]."""
        place, reach = self._place(), REACH * math.sqrt(self.epsilon)
        limit = reach + (self.n_seq if self.positions == "index" else math.log(self.n_seq + 1))
        bumps = [
            (k * math.log(p), self.compute_alpha_coefficients(p, k))
            for p in self.get_prime_indices()
            for k in range(1, min(self.k_max, int(limit / math.log(p))) + 1)
        ]
        near = torch.tensor(bumps, dtype=torch.float64).reshape(-1, 2)
        total = torch.zeros_like(place)
        for centre, alpha in (part.unbind(1) for part in torch.split(near, BLOCK)):
            total += alpha @ torch.exp((place - centre[:, None]).square() / (-2 * self.epsilon))
        return total / math.sqrt(self.epsilon)

    def values(self) -> Tensor:
        """The fixed potential: float64 [n_seq]."""
        return self.scale * self.bump.double()

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or not x.is_floating_point():
            raise ValueError(f"x {tuple(x.shape)} {x.dtype} must be float [batch, sequence, width]")
        if not 1 <= x.shape[1] <= self.n_seq:
            raise ValueError(f"sequence of x ({x.shape[1]}) must be >= 1 and <= n_seq ({self.n_seq})")
        dtype = torch.promote_types(x.dtype, torch.float32)
        v_BN = self.values()[: x.shape[1]].to(dtype).expand(x.shape[:2])
        if self.projection is None:
            return v_BN
        if x.shape[-1] != self.projection.in_features:
            raise ValueError(f"width of x ({x.shape[-1]}) must equal d_model ({self.projection.in_features})")
        return v_BN + self.projection(x).squeeze(-1).to(dtype)

    def get_prime_indices(self) -> list[int]:
        """The primes below n_seq, in order (Eratosthenes)."""
        is_prime = bytearray([1]) * max(self.n_seq, 2)
        is_prime[:2] = bytes(2)
        for p in range(2, math.isqrt(self.n_seq) + 1):
            if is_prime[p]:
                is_prime[p * p :: p] = bytes(len(is_prime[p * p :: p]))
        return [p for p in range(self.n_seq) if is_prime[p]]

    def compute_alpha_coefficients(self, p: int, k: int) -> float:
        """alpha_{p,k} = log p / p^{k (1/2 + epsilon)}.

        Raises:
            ValueError: p < 2 or k < 1.
        """
        if p < 2 or k < 1:
            raise ValueError(f"p ({p}) must be >= 2 and k ({k}) >= 1")
        return math.log(p) * math.exp(-k * (0.5 + self.epsilon) * math.log(p))  # which underflows to 0

    def verify_gue_statistics(self) -> dict[str, float | int | str]:
        """How the eigenvalues of the lattice operator (hopping 1) with the fixed potential on n_seq sites are spaced.

        Measured, not assumed: the answer may be, and here is, "none". See
        :class:`~trix.resnet_bk.statistics.SpacingStatistics`.

        Returns:
            mean_gap_ratio; ks_gue, ks_goe, ks_poisson; n, the number of spacings; closest.

        Raises:
            ValueError: n_seq is too small to be unfolded, below 38.
        """
        diagonal = self.values().cpu().numpy()
        found = spacing_statistics(eigh_tridiagonal(diagonal, torch.ones(self.n_seq - 1).numpy(), eigvals_only=True))._asdict()
        return {"n": found.pop("num_spacings"), **found}

    def extra_repr(self) -> str:
        return (
            f"n_seq={self.n_seq}, epsilon={self.epsilon}, k_max={self.k_max}, scale={self.scale}, positions={self.positions!r}"
        )
