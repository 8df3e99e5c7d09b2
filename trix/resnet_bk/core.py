"""BirmanSchwingerCore: the diagonal of a resolvent, and what can be said of its Birman-Schwinger kernel.

Legend: B batch, N sequence.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from trix.functional.resolvent import check_choice, resolvent_pivots, two_sided_diagonal
from trix.resnet_bk.kernel import (
    FreeKind,
    check_z,
    hilbert_schmidt_norm,
    lattice_pivots,
    norm_bounds,
    trace_norm,
    weighted_hilbert_schmidt,
)
from trix.resnet_bk.mourre import check_mourre

Mode = Literal["causal", "two_sided"]
DTYPES = {"complex64": torch.float32, "complex128": torch.float64}
MAX_EXACT_SITES = 512  # up to which the trace norm is computed by an SVD
TOLERANCE = 1e-6  # of the Mourre identities


class BirmanSchwingerCore(nn.Module):
    """G_ii of (H - z)^-1, H = H0 + V on the lattice (hopping 1), z = lambda + i eta.

    "causal": G_t is the last diagonal entry of the inverse of the leading block 0..t, by G_t = 1 / (v_t - z - G_{t-1}); it
    depends on v up to t alone. "two_sided": the diagonal of the inverse of the whole operator, as the interface words it. That
    leaks: every entry depends on every v. It is for encoders and analysis.

    What the interface guarantees, and what is so:
        |G| <= 1 / eta and Im G > 0: theorem, for every v and eta > 0; so nothing is clamped and no NaN is repaired.
        |K|_2 <= |V|_2 / (2 sqrt(eta)): claimed and false; N = 256, z = 1.95 + .01i, V = 1 exceeds it 2.98 times.
        |K|_1 <= |V|_1 / (2 eta): claimed and false; N = 64, eta = 10, V at one site exceeds it 1.96 times.
        |K|_2 <= |V|_2 sqrt(max Im R0_ii / eta) and |K|_1 <= |V|_1 / eta: theorems on the lattice
            (:func:`~trix.resnet_bk.kernel.norm_bounds`).
        [H0, iA] = 1: claimed and false in finite dimension, where a commutator has trace 0; see :meth:`verify_mourre_estimate`.

    Args:
        n_seq: longest sequence.
        epsilon: with use_lap, eta is raised to at least epsilon / n_seq, and the weights of the limiting absorption norm are
            (1 + j^2)^(-s/2), s = 1/2 + epsilon.
        use_mourre: allows :meth:`verify_mourre_estimate`, and reports it in :meth:`diagnostics`.
        use_lap: the floor of eta, and the weighted norm in :meth:`diagnostics`. Eigenvalues of n_seq sites are about 4 / n_seq
            apart; closer to the axis one sees single eigenvalues, not the limit.
        precision: "complex64" computes and answers in float32, with a relative error of about 1e-7 / eta; "complex128" in
            float64. Diagnostics are always in float64.
        mode: "causal" or "two_sided". free_kind: the free resolvent in the kernel K, "lattice" or "first_order"; the operator H
            is the lattice's in either case.

    Shape:
        v: float [B, N], 1 <= N <= n_seq; z: complex, Im z > 0 -> G_ii [B, N, 2] (real, imaginary).

    Raises:
        ValueError: n_seq < 1, epsilon <= 0, an unknown precision, mode or free_kind; a v of another shape or kind of number, or
            not finite; Im z <= 0.
    """

    def __init__(
        self,
        n_seq: int,
        epsilon: float = 1.0,
        use_mourre: bool = True,
        use_lap: bool = True,
        precision: str = "complex128",
        *,
        mode: Mode = "causal",
        free_kind: FreeKind = "lattice",
    ) -> None:
        super().__init__()
        if n_seq < 1:
            raise ValueError(f"n_seq ({n_seq}) must be >= 1")
        if not 0 < epsilon < math.inf:
            raise ValueError(f"epsilon ({epsilon}) must be > 0 and finite")
        check_choice("precision", precision, tuple(DTYPES))
        check_choice("mode", mode, get_args(Mode))
        check_choice("free_kind", free_kind, get_args(FreeKind))
        self.n_seq, self.epsilon, self.use_mourre, self.use_lap = n_seq, epsilon, use_mourre, use_lap
        self.precision, self.mode, self.free_kind = precision, mode, free_kind
        self.clipping_threshold = math.inf
        self._last: tuple[Tensor, complex, int, float] | None = None

    def forward(self, v: Tensor, z: complex = 1.0j) -> Tensor:
        self._check_potential(v)
        z = complex(z)
        check_z(z)
        if self.use_lap:
            z = complex(z.real, max(z.imag, self.epsilon / self.n_seq))
        v = v.to(DTYPES[self.precision])
        limit = self.clipping_threshold * z.imag / self.n_seq
        num_clipped = int((v.detach().abs() > limit).sum())
        if num_clipped:
            v = v.clamp(-limit, limit)
        alpha, w = lattice_pivots(v, z)
        G = resolvent_pivots(alpha, w) if self.mode == "causal" else two_sided_diagonal(alpha, w)
        G_ii = torch.stack(G, dim=-1)
        self._last = v.detach().double(), z, num_clipped, float(G_ii.detach().norm(dim=-1).max()) * z.imag
        return G_ii

    @torch.no_grad()
    def compute_schatten_norms(self) -> tuple[float, float]:
        """(|K|_1, |K|_2) of the last forward; of a batch the largest of each.

        |K|_2 is exact. |K|_1 is exact up to 512 sites, and above, where an SVD would cost O(N^3), the bound of the theorem;
        ``schatten_s1_is_bound`` in :meth:`diagnostics` says which.

        Raises:
            ValueError: there was no forward.
        """
        v, z, *_ = self._of_last_forward("compute_schatten_norms")
        s1 = norm_bounds(v, z, self.free_kind)["s1"] if self._is_bound(v) else trace_norm(v, z, self.free_kind)
        return float(s1.max()), float(hilbert_schmidt_norm(v, z, self.free_kind).max())

    def verify_mourre_estimate(self) -> bool:
        """Whether the commutators come out as they can on finitely many sites, with errors < 1e-6.

        Claimed and false: [H0, iA] = 1. Theorems, checked here on up to 256 sites: [P, iX] = 1 - w w^T with the sinc-DVR
        momentum, a defect of rank 1; and [H0, iA] = 4 - H0^2 on the inner rows of the lattice, with a defect of rank 2 at its
        ends. See :class:`~trix.resnet_bk.mourre.MourreCheck`. No potential has a part in it.

        Raises:
            ValueError: use_mourre is False.
        """
        if not self.use_mourre:
            raise ValueError(f"use_mourre ({self.use_mourre}) must be True for verify_mourre_estimate")
        found = check_mourre(self.n_seq)
        is_exact = max(found.momentum_error, found.lattice_error) < TOLERANCE
        return is_exact and (found.momentum_defect_rank, found.lattice_defect_rank) == (1, 2)

    def apply_spectral_clipping(self, threshold: float) -> None:
        """Clip v in later forwards to |v_i| <= threshold * eta / n_seq; off before the first call, and with inf.

        Theorem: then |K|_1 <= |V|_1 / eta <= threshold. Each site for itself, so causal; v beyond the limit gets no gradient.
        No eigenvalue is computed: to clip those of K would mix all tokens.

        Raises:
            ValueError: threshold <= 0.
        """
        if not threshold > 0:
            raise ValueError(f"threshold ({threshold}) must be > 0")
        self.clipping_threshold = threshold

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float | int | bool]:
        """What is known of the last forward; of a batch the largest of each.

        Returns:
            eta: as used, not below the floor. gain: max |G| eta, at most 1 (theorem). num_clipped: sites.
            schatten_s1, schatten_s1_is_bound, schatten_s2: as :meth:`compute_schatten_norms`.
            bound_s1, bound_s2, claimed_s1, claimed_s2: see :func:`~trix.resnet_bk.kernel.norm_bounds`.
            With use_lap: eta_times_n, which has to be large against 1 for what follows to mean anything; weighted_norm:
            |w (H - z)^-1 w|_2 with the weights w_j = (1 + j^2)^(-s/2). Limiting absorption (theorem, without a potential) says
            that it stays finite as eta goes to 0 on an endless lattice, within the band.
            With use_mourre: the fields of :class:`~trix.resnet_bk.mourre.MourreCheck`.

        Raises:
            ValueError: there was no forward.
        """
        v, z, num_clipped, gain = self._of_last_forward("diagnostics")
        s1, s2 = self.compute_schatten_norms()
        found: dict[str, float | int | bool] = {"eta": z.imag, "gain": gain, "num_clipped": num_clipped}
        found |= {"schatten_s1": s1, "schatten_s1_is_bound": self._is_bound(v), "schatten_s2": s2}
        for name, bound in norm_bounds(v, z, self.free_kind).items():
            found[name if name.startswith("claimed") else f"bound_{name}"] = float(bound.max())
        if self.use_lap:
            place = torch.arange(v.shape[-1], dtype=v.dtype, device=v.device)
            weight = (1.0 + place.square()).pow(-0.5 * (0.5 + self.epsilon)).expand_as(v)
            found["eta_times_n"] = z.imag * v.shape[-1]
            found["weighted_norm"] = float(weighted_hilbert_schmidt(v, z, weight).max())
        return found | (check_mourre(self.n_seq)._asdict() if self.use_mourre else {})

    @staticmethod
    def _is_bound(v: Tensor) -> bool:
        return v.shape[-1] > MAX_EXACT_SITES

    def _of_last_forward(self, what: str) -> tuple[Tensor, complex, int, float]:
        if self._last is None:
            raise ValueError(f"a forward must come before {what}")
        return self._last

    def _check_potential(self, v: Tensor) -> None:
        if v.ndim != 2 or not v.is_floating_point():
            raise ValueError(f"v {tuple(v.shape)} {v.dtype} must be float [batch, sequence]")
        if v.shape[0] < 1 or not 1 <= v.shape[1] <= self.n_seq:
            raise ValueError(
                f"batch of v ({v.shape[0]}) must be >= 1, its sequence ({v.shape[1]}) >= 1 and <= n_seq ({self.n_seq})"
            )
        if not bool(v.isfinite().all()):
            raise ValueError(f"v ({float(v[~v.isfinite()][0])}) must be finite")

    def extra_repr(self) -> str:
        return (
            f"n_seq={self.n_seq}, epsilon={self.epsilon}, precision={self.precision!r}, mode={self.mode!r}, "
            f"free_kind={self.free_kind!r}"
        )
