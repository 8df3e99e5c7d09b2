"""Norms against dense linear algebra, bounds that hold, and counterexamples to those that are claimed."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix.resnet_bk.kernel import (
    FreeKind,
    birman_schwinger_kernel,
    free_resolvent,
    hilbert_schmidt_norm,
    lattice_operator,
    norm_bounds,
    prefix_determinant,
    trace_norm,
    weighted_hilbert_schmidt,
)

KINDS: tuple[FreeKind, ...] = ("lattice", "first_order")
every_kind = pytest.mark.parametrize("kind", KINDS)


def potential(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64)


def identity(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.complex128)


def test_the_lattice_resolvent_inverts_the_operator() -> None:
    R0 = free_resolvent(30, 0.4 + 0.3j)
    torch.testing.assert_close((lattice_operator(torch.zeros(30)) - (0.4 + 0.3j) * identity(30)) @ R0, identity(30))


def test_the_first_order_resolvent_solves_its_equation_and_does_not_grow() -> None:
    z = 0.4 + 0.3j
    R0 = free_resolvent(40, z, "first_order")
    assert R0.abs().max() < 1.0
    # g[u] = i exp(i z u) for u > 0 solves -i g' - z g = delta: it jumps by i at 0, and turns by exp(i z) per step after.
    torch.testing.assert_close(R0[2:, 0] / R0[1:-1, 0], torch.full((38,), 1j * z, dtype=torch.complex128).exp())
    assert R0[1, 0] == pytest.approx(1j * complex(math.cos(0.4), math.sin(0.4)) * math.exp(-0.3))
    claimed = torch.tensor(
        [0.5j * (-1) * complex(math.cos(0.4 * d), math.sin(0.4 * d)) * math.exp(-0.3 * d) for d in (-20, 20)]
    )
    assert claimed.abs().tolist() == pytest.approx([202, 0.001], rel=0.25)
    assert free_resolvent(2000, 1j, "first_order").isfinite().all()


@pytest.mark.parametrize("z", [1j, 0.4 + 0.3j, 1.95 + 0.01j])
def test_the_kernel_gives_the_ratio_of_determinants_also_of_a_signed_potential(z: complex) -> None:
    v = potential(3, 24)
    found = torch.linalg.det(identity(24) + birman_schwinger_kernel(v, z))
    with_v, free = (torch.linalg.det(lattice_operator(one) - z * identity(24)) for one in (v, torch.zeros_like(v)))
    torch.testing.assert_close(found, with_v / free, rtol=1e-9, atol=0)
    unsigned = torch.linalg.det(identity(24) + birman_schwinger_kernel(v.abs(), z))
    assert not torch.allclose(unsigned, with_v / free, rtol=0.1)


@pytest.mark.parametrize("z", [1j, 0.4 + 0.3j, 1.95 + 0.01j])
def test_prefix_determinants_are_those_of_each_leading_block(z: complex) -> None:
    v = potential(2, 37)
    plain, regularized = (prefix_determinant(v, z, is_regularized=one) for one in (False, True))
    for t in range(37):
        K = birman_schwinger_kernel(v[:, : t + 1], z)
        det = torch.linalg.det(identity(t + 1) + K)
        torch.testing.assert_close(plain[:, t], det, rtol=1e-9, atol=0)
        trace = K.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
        torch.testing.assert_close(regularized[:, t], det * (-trace).exp(), rtol=1e-9, atol=0)
    torch.testing.assert_close(prefix_determinant(v[0, :9], z), regularized[0, :9])


@every_kind
@pytest.mark.parametrize("num_sites", [1, 2, 33])
@pytest.mark.parametrize("z", [1j, 0.4 + 0.3j, 1.95 + 0.01j])
def test_norms_are_those_of_the_dense_kernel(num_sites: int, z: complex, kind: FreeKind) -> None:
    v = potential(3, num_sites)
    K = birman_schwinger_kernel(v, z, kind)
    torch.testing.assert_close(hilbert_schmidt_norm(v, z, kind), torch.linalg.matrix_norm(K))
    torch.testing.assert_close(trace_norm(v, z, kind), torch.linalg.matrix_norm(K, "nuc"))


def test_a_weighted_norm_is_that_of_the_dense_resolvent() -> None:
    v, weight, z = potential(2, 30), torch.rand(2, 30, dtype=torch.float64), 0.3 + 0.05j
    R = torch.linalg.inv(lattice_operator(v) - z * identity(30))
    expected = torch.linalg.matrix_norm(weight.unsqueeze(-1) * R * weight.unsqueeze(-2))
    torch.testing.assert_close(weighted_hilbert_schmidt(v, z, weight), expected)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.floats(-3, 3), st.floats(1e-3, 20), st.sampled_from(KINDS), st.integers(0, 99))
def test_the_bounds_hold(num_sites: int, energy: float, eta: float, kind: FreeKind, seed: int) -> None:
    v, z = torch.randn(num_sites, generator=torch.Generator().manual_seed(seed), dtype=torch.float64), complex(energy, eta)
    bound = norm_bounds(v, z, kind)
    assert trace_norm(v, z, kind) <= bound["s1"] * (1 + 1e-9)
    assert hilbert_schmidt_norm(v, z, kind) <= bound["s2"] * (1 + 1e-9)
    if kind == "lattice":
        assert bound["s2"] <= v.norm() / eta * (1 + 1e-9)


def test_the_claimed_bounds_are_false() -> None:
    v, z = torch.ones(256), 1.95 + 0.01j
    assert hilbert_schmidt_norm(v, z) / norm_bounds(v, z)["claimed_s2"] == pytest.approx(2.98, abs=0.005)
    v, z = torch.eye(64)[32], 10j
    assert trace_norm(v, z) / norm_bounds(v, z)["claimed_s1"] == pytest.approx(1.96, abs=0.005)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_sites \(0\) must be >= 1"):
        free_resolvent(0, 1j)
    with pytest.raises(ValueError, match=r"eta = Im z \(0.0\) must be > 0"):
        free_resolvent(3, 1 + 0j)
    with pytest.raises(ValueError, match=r"kind \('continuum'\) must be one of lattice, first_order"):
        free_resolvent(3, 1j, "continuum")  # type: ignore[arg-type]
