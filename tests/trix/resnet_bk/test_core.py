import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix.resnet_bk import BirmanSchwingerCore
from trix.resnet_bk.kernel import birman_schwinger_kernel, lattice_operator, norm_bounds
from trix.resnet_bk.mourre import check_mourre


def potential(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(shape, dtype=torch.float64)


def inverse(v: Tensor, z: complex) -> Tensor:
    return torch.linalg.inv(lattice_operator(v) - z * torch.eye(v.shape[-1], dtype=torch.complex128))


def test_the_seeds_example() -> None:
    core = BirmanSchwingerCore(n_seq=512, epsilon=1.0)
    G_ii = core(torch.randn(8, 512), z=1.0j)
    assert G_ii.shape == (8, 512, 2)
    assert G_ii.dtype == torch.float64
    core(torch.randn(1, 512))
    s1, s2 = core.compute_schatten_norms()
    assert isinstance(s1, float)
    assert s1 > s2 > 0
    assert core.verify_mourre_estimate() is True


@pytest.mark.parametrize("z", [1j, -0.7 + 0.2j])
@pytest.mark.parametrize("num_sites", [1, 2, 37])
def test_both_diagonals_are_those_of_dense_inverses(num_sites: int, z: complex) -> None:
    v = potential(2, num_sites)
    found = {mode: BirmanSchwingerCore(40, mode=mode)(v, z) for mode in ("causal", "two_sided")}
    two_sided = inverse(v, z).diagonal(dim1=-2, dim2=-1)
    causal = torch.stack([inverse(v[:, : t + 1], z)[:, t, t] for t in range(num_sites)], dim=1)
    torch.testing.assert_close(torch.view_as_complex(found["two_sided"]), two_sided, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.view_as_complex(found["causal"]), causal, rtol=1e-12, atol=1e-12)


def test_the_causal_diagonal_sees_no_later_site_and_the_two_sided_one_leaks() -> None:
    v = potential(1, 16).requires_grad_()
    for mode, leaks in (("causal", False), ("two_sided", True)):
        G_ii = BirmanSchwingerCore(16, mode=mode)(v)
        (grad,) = torch.autograd.grad(G_ii[0, 5].sum(), v)
        assert bool(grad[0, 6:].abs().max() > 0) == leaks
        assert torch.autograd.gradcheck(BirmanSchwingerCore(16, mode=mode), (v,))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.floats(-3, 3), st.floats(1e-3, 10))
def test_g_is_bounded_without_a_clamp(sites: list[float], energy: float, eta: float) -> None:
    core = BirmanSchwingerCore(20, use_lap=False)
    G_ii = core(torch.tensor([sites], dtype=torch.float64), complex(energy, eta))
    assert G_ii.norm(dim=-1).max() * eta <= 1 + 1e-12
    assert G_ii[..., 1].min() >= 0
    assert core.diagnostics()["gain"] <= 1 + 1e-12


def test_precision_is_that_of_the_answer() -> None:
    v = potential(2, 64)
    single, double = (BirmanSchwingerCore(64, precision=precision)(v, 0.1j) for precision in ("complex64", "complex128"))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert 0 < (single - double).abs().max() < 1e-4


def test_epsilon_and_lap_raise_eta() -> None:
    v = potential(1, 50)
    z = 0.3 + 1e-4j
    floor = 0.3 + 0.5j / 50
    raised, plain = BirmanSchwingerCore(50, epsilon=0.5), BirmanSchwingerCore(50, epsilon=0.5, use_lap=False)
    torch.testing.assert_close(raised(v, z), plain(v, floor))
    assert not torch.allclose(raised(v, z), plain(v, z))
    assert not torch.allclose(raised(v, z), BirmanSchwingerCore(50, epsilon=1.0)(v, z))
    assert raised.diagnostics()["eta"] == 0.01
    assert torch.equal(raised(v, 1j), plain(v, 1j))


def test_the_weighted_norm_converges_on_the_way_to_the_axis_where_the_plain_one_grows() -> None:
    weighted, plain = [], []
    for eta in (0.1, 0.03, 0.01):
        core = BirmanSchwingerCore(1024, use_mourre=False)
        core(torch.zeros(1, 1024), 0.4 + 1j * eta)
        found = core.diagnostics()
        weighted.append(found["weighted_norm"])
        assert found["eta_times_n"] == pytest.approx(1024 * eta)
        core(torch.ones(1, 1024), 0.4 + 1j * eta)
        plain.append(core.compute_schatten_norms()[1])
    assert weighted == pytest.approx([1.316, 1.401, 1.428], abs=0.002)
    assert plain[2] / plain[0] > 3


def test_the_weights_depend_on_epsilon() -> None:
    found = []
    for epsilon in (0.5, 1.0):
        core = BirmanSchwingerCore(30, epsilon=epsilon)
        core(potential(1, 30))
        found.append(core.diagnostics()["weighted_norm"])
    assert found[0] > found[1]


@pytest.mark.parametrize("kind", ["lattice", "first_order"])
def test_schatten_norms_and_bounds_are_the_largest_of_the_batch(kind: Any) -> None:
    v, z = potential(3, 20), 0.2 + 0.5j
    core = BirmanSchwingerCore(20, free_kind=kind)
    core(v, z)
    K = birman_schwinger_kernel(v, z, kind)
    assert core.compute_schatten_norms() == pytest.approx(
        (float(torch.linalg.matrix_norm(K, "nuc").max()), float(torch.linalg.matrix_norm(K).max()))
    )
    found = core.diagnostics()
    assert (found["schatten_s1"], found["schatten_s2"]) == core.compute_schatten_norms()
    assert not found["schatten_s1_is_bound"]
    bounds = norm_bounds(v, z, kind)
    assert found["bound_s1"] == float(bounds["s1"].max())
    assert found["claimed_s2"] == float(bounds["claimed_s2"].max())
    assert found["schatten_s2"] <= found["bound_s2"]


def test_above_512_sites_the_trace_norm_is_its_bound_and_says_so() -> None:
    core = BirmanSchwingerCore(600, use_mourre=False)
    v = potential(1, 600)
    core(v, 0.5j)
    found = core.diagnostics()
    assert found["schatten_s1_is_bound"]
    assert found["schatten_s1"] == pytest.approx(float(v.abs().sum()) / 0.5)


def test_clipping_keeps_the_trace_norm_below_the_threshold_and_is_off_before() -> None:
    core, v, z = BirmanSchwingerCore(20), potential(2, 20), 0.3 + 0.4j
    before = core(v, z)
    assert core.diagnostics()["num_clipped"] == 0
    core.apply_spectral_clipping(2.0)
    after = core(v, z)
    limit = 2.0 * 0.4 / 20
    torch.testing.assert_close(after, BirmanSchwingerCore(20)(v.clamp(-limit, limit), z))
    assert not torch.allclose(before, after)
    assert core.compute_schatten_norms()[0] <= 2.0
    assert core.diagnostics()["num_clipped"] == int((v.abs() > limit).sum())
    core.apply_spectral_clipping(math.inf)
    assert torch.equal(core(v, z), before)


def test_commutators_are_what_finite_dimension_allows() -> None:
    for num_sites in (1, 5, 300):
        found = check_mourre(num_sites)
        assert max(found.momentum_error, found.lattice_error) < 1e-12
        assert (found.momentum_defect_rank, found.lattice_defect_rank) == (1, 2)
    # A commutator has trace 0: [H0, iA] = 1 would have trace N.
    H0, A = (torch.randn(9, 9, dtype=torch.complex128) for _ in range(2))
    assert torch.trace(H0 @ A - A @ H0).abs() < 1e-12


def test_a_broken_identity_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = check_mourre(8)
    for change in ({"momentum_error": 1e-5}, {"lattice_error": 1e-5}, {"lattice_defect_rank": 3}):
        monkeypatch.setattr("trix.resnet_bk.core.check_mourre", lambda _, change=change: exact._replace(**change))
        assert not BirmanSchwingerCore(8).verify_mourre_estimate()


def test_switches_say_what_is_reported() -> None:
    core = BirmanSchwingerCore(8, use_mourre=False, use_lap=False)
    core(potential(1, 8))
    assert not {"weighted_norm", "eta_times_n", "momentum_error"} & set(core.diagnostics())
    core = BirmanSchwingerCore(8)
    core(potential(1, 8))
    assert {"weighted_norm", "eta_times_n", "momentum_error", "lattice_defect_rank"} <= set(core.diagnostics())
    with pytest.raises(ValueError, match=r"use_mourre \(False\) must be True for verify_mourre_estimate"):
        BirmanSchwingerCore(8, use_mourre=False).verify_mourre_estimate()


def test_shorter_texts_and_copies() -> None:
    core = BirmanSchwingerCore(64)
    v = potential(2, 64)
    whole = core(v, 0.3j)
    torch.testing.assert_close(core(v[:, :10], 0.3j), whole[:, :10])
    assert copy.deepcopy(core).compute_schatten_norms() == core.compute_schatten_norms()
    assert core.state_dict() == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_seq": 0}, r"n_seq \(0\) must be >= 1"),
        ({"epsilon": 0.0}, r"epsilon \(0.0\) must be > 0 and finite"),
        ({"precision": "float32"}, r"precision \('float32'\) must be one of complex64, complex128"),
        ({"mode": "right"}, r"mode \('right'\) must be one of causal, two_sided"),
        ({"free_kind": "none"}, r"free_kind \('none'\) must be one of lattice, first_order"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BirmanSchwingerCore(**{"n_seq": 8} | arguments)


@pytest.mark.parametrize(
    ("v", "z", "message"),
    [
        (torch.zeros(1, 9), 1j, r"sequence \(9\) >= 1 and <= n_seq \(8\)"),
        (torch.zeros(1, 0), 1j, r"sequence \(0\) >= 1 and <= n_seq \(8\)"),
        (torch.zeros(0, 8), 1j, r"batch of v \(0\) must be >= 1"),
        (torch.zeros(8), 1j, r"v \(8,\) torch.float32 must be float \[batch, sequence\]"),
        (torch.zeros(1, 8, dtype=torch.int64), 1j, r"v \(1, 8\) torch.int64 must be float"),
        (torch.zeros(1, 8, dtype=torch.complex64), 1j, r"v \(1, 8\) torch.complex64 must be float"),
        (torch.tensor([[1.0, math.nan]]), 1j, r"v \(nan\) must be finite"),
        (torch.tensor([[1.0, -math.inf]]), 1j, r"v \(-inf\) must be finite"),
        (torch.zeros(1, 8), 1.0, r"eta = Im z \(0.0\) must be > 0"),
        (torch.zeros(1, 8), 1 - 2j, r"eta = Im z \(-2.0\) must be > 0"),
        (torch.zeros(1, 8), complex(math.nan, 1), r"z \(\(?nan\+1j\)?\) must be finite"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(v: Tensor, z: complex, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BirmanSchwingerCore(8)(v, z)


def test_what_needs_a_forward_or_a_positive_threshold_says_so() -> None:
    core = BirmanSchwingerCore(8)
    with pytest.raises(ValueError, match="a forward must come before compute_schatten_norms"):
        core.compute_schatten_norms()
    with pytest.raises(ValueError, match="a forward must come before diagnostics"):
        core.diagnostics()
    with pytest.raises(ValueError, match=r"threshold \(0.0\) must be > 0"):
        core.apply_spectral_clipping(0.0)
