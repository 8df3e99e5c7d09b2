"""The Birman-Schwinger kernel: free resolvents, determinants, norms, bounds that hold, and those that are only claimed.

K = |V|^(1/2) R0(z) sgn(V) |V|^(1/2), z = lambda + i eta. With the sign det(1 + K) = det(H - z) / det(H0 - z) for every real V;
without it that holds for V >= 0 alone.

Two free resolvents R0 on N sites:
    lattice: the inverse of H0 - z, H0 = hopping 1 between neighbours. What the rest of the package computes with.
    first_order: R0[u, v] = i exp(i z (u - v)) for u > v, else 0: that of -i d/dx for Im z > 0. The formula
        (i/2) exp(i z (u - v)) sgn(u - v), claimed for all u and v, is no resolvent for Im z > 0: for u < v it grows like
        exp(eta |u - v|) (z = .4 + .3i: 202 at u - v = -20).

Legend: B batch, N sequence.
"""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from trix.functional.linear_recurrence import linear_recurrence
from trix.functional.resolvent import Pair, check_choice, log_prefix_determinant, resolvent_pivots, two_sided_diagonal

FreeKind = Literal["lattice", "first_order"]


def free_resolvent(num_sites: int, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """R0(z): complex128 [N, N].

    Raises:
        ValueError: num_sites < 1, Im z <= 0, or another kind.
    """
    if num_sites < 1:
        raise ValueError(f"num_sites ({num_sites}) must be >= 1")
    check_z(z)
    check_choice("kind", kind, get_args(FreeKind))
    if kind == "first_order":
        place = torch.arange(num_sites, dtype=torch.float64)
        distance = (place[:, None] - place).clamp_min(0.0)  # before exp, which would overflow above the diagonal
        return (1j * torch.exp(1j * z * distance)).tril(-1)
    return torch.linalg.inv(
        lattice_operator(torch.zeros(num_sites, dtype=torch.float64)) - z * torch.eye(num_sites).to(torch.complex128)
    )


def lattice_operator(v: Tensor) -> Tensor:
    """H = v on the diagonal, 1 next to it: float64 [..., N, N] of v [..., N]."""
    hopping = torch.ones(v.shape[-1] - 1, dtype=torch.float64, device=v.device)
    return torch.diag_embed(v.double()) + hopping.diag(1) + hopping.diag(-1)


def birman_schwinger_kernel(v: Tensor, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """K [..., N, N] complex128 of the potential v [..., N]."""
    v = v.double()
    root = v.abs().sqrt()
    R0 = free_resolvent(v.shape[-1], z, kind).to(v.device)
    return root.unsqueeze(-1) * R0 * (v.sign() * root).unsqueeze(-2)


def lattice_pivots(v: Tensor, z: complex) -> tuple[Pair, Tensor]:
    """alpha = v - z as a pair, and hopping 1, both [..., N]: what the functions of the resolvent take."""
    return Pair(v - z.real, torch.full_like(v, -z.imag)), torch.ones_like(v)


def weighted_hilbert_schmidt(v: Tensor, z: complex, weight: Tensor) -> Tensor:
    """|diag(weight) (H - z)^-1 diag(weight)|_2 of the lattice operator with the potential v, in O(N): [...].

    By R_ij = R_ii prod_{k=j}^{i-1} (-G_k) for i > j, with the pivots G from the left, and R_ij = R_ji.

    Args:
        v, weight: float64 [..., N].
    """
    alpha, w = lattice_pivots(v, z)
    diagonal_re, diagonal_im = two_sided_diagonal(alpha, w)
    G = resolvent_pivots(alpha, w)
    diagonal_square, G_square = diagonal_re.square() + diagonal_im.square(), G.re.square() + G.im.square()
    square = weight.square()
    return (square * diagonal_square * (square + 2.0 * _sum_before(square, G_square))).sum(dim=-1).sqrt()


def _sum_before(value: Tensor, decay: Tensor) -> Tensor:
    """sum_{j < i} value_j prod_{k=j}^{i-1} decay_k, both [..., N]."""
    shape = value.shape
    decay, value = (torch.nn.functional.pad(one.reshape(-1, one.shape[-1])[:, :-1], (1, 0)) for one in (decay, value))
    h = linear_recurrence(decay, (decay * value).unsqueeze(-1), torch.zeros_like(value[:, :1]))
    return h.reshape(shape)


def hilbert_schmidt_norm(v: Tensor, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """|K|_2, exactly, in O(N): float64 [...] of v [..., N]."""
    size = v.double().abs()
    if kind == "lattice":
        return weighted_hilbert_schmidt(torch.zeros_like(size), z, size.sqrt())
    decay = torch.full_like(size, math.exp(-2.0 * z.imag))
    return (size * _sum_before(size, decay)).sum(dim=-1).sqrt()


def trace_norm(v: Tensor, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """|K|_1, exactly, by the singular values, in O(N^3): float64 [...] of v [..., N]."""
    return torch.linalg.svdvals(birman_schwinger_kernel(v, z, kind)).sum(dim=-1)


def prefix_determinant(v: Tensor, z: complex, *, is_regularized: bool = True) -> Tensor:
    """D_t = det(1 + K_t), or det_2(1 + K_t) = D_t exp(-tr K_t), K_t the lattice kernel of sites 0..t: complex128 [..., N].

    Causal, O(N): D_t = prod_{i <= t} G0_i / G_i with the pivots with and without v; and tr K_t grows by m_t / G0_t, where
    m_t = sum_i v_i R0_it^2 = G0_t^2 (m_{t-1} + v_t) on sites 0..t. The trace on the whole lattice would look ahead: its R0_ii
    depends on the number of sites.
    """
    v = v.double()
    G, G0 = (resolvent_pivots(*lattice_pivots(one, z)) for one in (v, torch.zeros_like(v)))
    log_D = torch.complex(*log_prefix_determinant(G, G0))
    if is_regularized:
        free = torch.complex(*G0).reshape(-1, v.shape[-1])
        x = free.square() * v.reshape(free.shape)
        m = linear_recurrence(free.square(), x.unsqueeze(-1), torch.zeros_like(x[:, :1])).squeeze(-1)
        log_D = log_D - (m / free).cumsum(-1).reshape(v.shape)
    return log_D.exp()


def norm_bounds(v: Tensor, z: complex, kind: FreeKind = "lattice") -> dict[str, Tensor]:
    """What |K|_1 and |K|_2 cannot exceed, and what they are only claimed not to: float64 [...] each.

    s1, s2 (theorem). Lattice: |V|_1 / eta and |V|_2 sqrt(max_i Im R0_ii / eta), as sum_j |R0_ij|^2 = Im R0_ii / eta; the latter
    is at most |V|_2 / eta. First order: |V|_1 / (e^eta - 1) and |V|_2 / sqrt(e^(2 eta) - 1), by summing over the distances.
    claimed_s1, claimed_s2: |V|_1 / (2 eta) and |V|_2 / (2 sqrt(eta)). False: on the lattice with N = 64, eta = 10 and one site
    the trace norm is 1.96 times claimed_s1; with N = 256, z = 1.95 + .01i and V = 1 the Hilbert-Schmidt norm is 2.98 times
    claimed_s2.
    """
    v, eta = v.double(), z.imag
    one, two = v.abs().sum(dim=-1), v.norm(dim=-1)
    if kind == "lattice":
        largest = two_sided_diagonal(*lattice_pivots(torch.zeros_like(v), z)).im.amax(dim=-1)
        s1, s2 = one / eta, two * (largest / eta).sqrt()
    else:
        s1, s2 = one / math.expm1(eta), two / math.sqrt(math.expm1(2.0 * eta))
    return {"s1": s1, "s2": s2, "claimed_s1": 0.5 * one / eta, "claimed_s2": 0.5 * two / math.sqrt(eta)}


def check_z(z: complex) -> None:
    if not (math.isfinite(z.real) and math.isfinite(z.imag)):
        raise ValueError(f"z ({z}) must be finite")
    if z.imag <= 0:
        raise ValueError(f"eta = Im z ({z.imag}) must be > 0")
