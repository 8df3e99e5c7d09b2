"""The Birman-Schwinger kernel and its norms: free resolvents, exact norms, bounds that hold, and those that are only claimed.

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
from typing import Literal

import torch
from torch import Tensor

from trix.functional.resolvent import Pair, resolvent_pivots, two_sided_diagonal

FreeKind = Literal["lattice", "first_order"]


def free_resolvent(num_sites: int, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """R0(z): complex128 [N, N].

    Raises:
        ValueError: num_sites < 1, Im z <= 0, or another kind.
    """
    if num_sites < 1:
        raise ValueError(f"num_sites ({num_sites}) must be >= 1")
    check_z(z)
    check_kind(kind)
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
    before, total = torch.zeros_like(square[..., 0]), torch.zeros_like(square[..., 0])
    for i in range(v.shape[-1]):
        if i:
            before = G_square[..., i - 1] * (before + square[..., i - 1])
        total = total + square[..., i] * diagonal_square[..., i] * (square[..., i] + 2.0 * before)
    return total.sqrt()


def hilbert_schmidt_norm(v: Tensor, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """|K|_2, exactly, in O(N): float64 [...] of v [..., N]."""
    size = v.double().abs()
    if kind == "lattice":
        return weighted_hilbert_schmidt(torch.zeros_like(size), z, size.sqrt())
    decay = math.exp(-2.0 * z.imag)
    before, total = torch.zeros_like(size[..., 0]), torch.zeros_like(size[..., 0])
    for i in range(1, v.shape[-1]):
        before = decay * (before + size[..., i - 1])
        total = total + size[..., i] * before
    return total.sqrt()


def trace_norm(v: Tensor, z: complex, kind: FreeKind = "lattice") -> Tensor:
    """|K|_1, exactly, by the singular values, in O(N^3): float64 [...] of v [..., N]."""
    return torch.linalg.svdvals(birman_schwinger_kernel(v, z, kind)).sum(dim=-1)


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


def check_kind(kind: str) -> None:
    if kind not in ("lattice", "first_order"):
        raise ValueError(f"kind ({kind!r}) must be 'lattice' or 'first_order'")
