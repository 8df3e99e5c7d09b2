import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from trix.functional.resolvent import Pair, resolvent_pivots
from trix.outputs import RowContext
from trix.resnet_bk import ScatteringRouter
from trix.routing import ScatteringRouter as TileRouter
from trix.routing.balance import tile_load


def resolvent(*shape: int, dtype: torch.dtype = torch.float32, eta: float = 0.5) -> Tensor:
    """Causal pivots of a random potential: [*shape, 2]."""
    torch.manual_seed(0)
    re = torch.randn(shape, dtype=dtype)
    G = resolvent_pivots(Pair(re, torch.full_like(re, -eta)), torch.ones_like(re))
    return torch.stack(G, dim=-1)


def of_phase(phase: Tensor) -> Tensor:
    return torch.stack([phase.cos(), phase.sin()], dim=-1)[None]


def test_the_rule() -> None:
    place = torch.tensor([0.1, 0.4, 1.2, 1.7, 3.6, 7.9])
    expert_idx, weight = ScatteringRouter(8)(of_phase(place * math.pi / 8))
    assert expert_idx[0].tolist() == [[0, 1], [0, 1], [0, 1], [1, 2], [3, 4], [6, 7]]
    bell = (-(place[:, None] - expert_idx[0] - 0.5).square() / (2 * 0.75**2)).exp()
    torch.testing.assert_close(weight[0], bell / bell.sum(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_the_seeds_example_works_and_warns_once() -> None:
    router, G_ii = ScatteringRouter(num_experts=8), torch.randn(8, 512, 2)
    with pytest.warns(UserWarning, match=r"Im G \(-.*\) should be > 0"):
        expert_idx, weight = router(G_ii)
    assert expert_idx.shape == weight.shape == (8, 512, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(router(-G_ii)[0], expert_idx)  # modulo pi
        ScatteringRouter(8)(resolvent(2, 9))


def test_the_router_of_the_tiles_with_equal_bins_chooses_the_same() -> None:
    G_ii = resolvent(3, 40)
    expert_idx, weight = ScatteringRouter(8, top_k=3)(G_ii)
    phase = ScatteringRouter(8).compute_scattering_phase(G_ii)
    tiles = TileRouter(4, 8, top_k=3)
    decision = tiles(torch.zeros(120, 4), RowContext(phase_T=phase.flatten()))
    order = decision.tile_idx.argsort(dim=1)
    assert torch.equal(decision.tile_idx.gather(1, order), expert_idx.flatten(0, 1))
    torch.testing.assert_close(decision.weight.gather(1, order), weight.flatten(0, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_clark", [False, True])
def test_causal_and_the_same_bits_for_every_prefix_and_row(is_clark: bool) -> None:
    router, re = ScatteringRouter(8, is_clark), torch.randn(3, 150)

    def route(re: Tensor) -> tuple[Tensor, Tensor]:
        G = resolvent_pivots(Pair(re, torch.full_like(re, -0.1)), torch.ones_like(re))
        return router(torch.stack(G, dim=-1))

    whole = route(re)
    for length in (*range(1, 40), 149):
        for row in range(3):
            part = route(re[row : row + 1, :length].clone())
            assert all(torch.equal(value, one[row : row + 1, :length]) for value, one in zip(part, whole, strict=True))


def test_bins_of_the_clark_measure_load_alike_where_energies_follow_it() -> None:
    torch.manual_seed(0)
    # The first entry of a uniform point of the sphere in 4 dimensions has the semicircle density.
    point = torch.randn(100_000, 4, dtype=torch.float64)
    energy = 2 * point[:, 0] / point.norm(dim=1)
    G = of_phase(torch.acos(-energy / 2))  # of the end site of a free half line: |G| = 1
    load = {is_clark: tile_load(ScatteringRouter(8, is_clark, top_k=1)(G)[0], 8) for is_clark in (False, True)}
    torch.testing.assert_close(load[True], torch.full((8,), 1 / 8), atol=0.005, rtol=0)
    assert load[False].min() < 0.03


def test_the_load_collapses_where_phases_are_close() -> None:
    torch.manual_seed(0)
    v = torch.randn(4000) * 0.02
    G = torch.stack([v, torch.ones_like(v)], dim=-1)[None] / (v.square() + 1)[..., None]
    load = tile_load(ScatteringRouter(8)(G)[0], 8)
    assert float(torch.special.entr(load).sum()) / math.log(8) == pytest.approx(1 / 3, abs=0.01)


def count_below(diagonal: Tensor, energy: float) -> Tensor:
    """The number of eigenvalues below the energy of each leading block of the lattice operator."""
    n = len(diagonal)
    H = torch.diag(diagonal) + torch.diag(torch.ones(n - 1).double(), 1) + torch.diag(torch.ones(n - 1).double(), -1)
    return torch.stack([(torch.linalg.eigvalsh(H[: t + 1, : t + 1]) < energy).sum() for t in range(n)])


def test_the_spectral_shift_counts_eigenvalues() -> None:
    torch.manual_seed(0)
    v = torch.randn(2, 24, dtype=torch.float64)
    energies = torch.tensor([-1.3, 0.37, 1.1], dtype=torch.float64)
    xi = ScatteringRouter(4).compute_spectral_shift(energies, potential=v, eta=1e-9)
    assert xi.shape == (3, 2, 24)
    for energy, of_energy in zip(energies.tolist(), xi, strict=True):
        for row, found in zip(v, of_energy, strict=True):
            expected = count_below(torch.zeros_like(row), energy) - count_below(row, energy)
            torch.testing.assert_close(found, expected.double(), atol=1e-5, rtol=0)
    one = ScatteringRouter(4).compute_spectral_shift(0.37, potential=v, eta=1e-9)
    assert torch.equal(one, xi[1])
    assert not torch.allclose(ScatteringRouter(4).compute_spectral_shift(0.37, potential=v, eta=1.0), one, atol=1e-2)


def test_the_spectral_shift_is_causal_and_differentiable() -> None:
    v = torch.randn(1, 12, dtype=torch.float64, requires_grad=True)
    xi = ScatteringRouter(4).compute_spectral_shift(0.3, potential=v, eta=0.1)
    (grad,) = torch.autograd.grad(xi[0, 5], v)
    assert grad[0, 6:].abs().max() == 0
    assert grad[0, :6].abs().min() > 0


def test_resonances_are_those_below_the_threshold_token_by_token() -> None:
    D = torch.tensor([[0.05 + 0.05j, 0.2 + 0j, 0.0 - 0.09j]])
    router = ScatteringRouter(4)
    assert router.detect_resonances(D).tolist() == [[True, False, True]]
    assert torch.equal(router.detect_resonances(torch.view_as_real(D)), router.detect_resonances(D))
    assert ScatteringRouter(4, resonance_threshold=0.3).detect_resonances(D).all()


@pytest.mark.parametrize("change", [{"num_experts": 5}, {"use_clark_measure": True}, {"top_k": 3}])
def test_every_argument_changes_the_choice(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"num_experts": 8}
    G_ii = resolvent(2, 64)
    (one, other) = (ScatteringRouter(**arguments | changed)(G_ii)[0] for changed in ({}, change))
    assert not torch.equal(one, other)


def test_one_expert_has_weight_1_and_two_have_a_gradient() -> None:
    G_ii = resolvent(2, 30, dtype=torch.float64).requires_grad_()
    one, two = ScatteringRouter(8, top_k=1)(G_ii)[1], ScatteringRouter(8)(G_ii)[1]
    assert torch.equal(one, torch.ones_like(one))
    assert torch.autograd.grad(one.sum(), G_ii)[0].abs().max() == 0
    assert torch.autograd.grad(two[..., 0].sum(), G_ii)[0].abs().max() > 0


def test_it_has_no_state() -> None:
    assert ScatteringRouter(8).state_dict() == {}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"top_k \(5\) must be >= 1 and <= num_experts \(4\)"):
        ScatteringRouter(4, top_k=5)
    with pytest.raises(ValueError, match=r"top_k \(2\) must be >= 1 and <= num_experts \(1\)"):
        ScatteringRouter(1)
    with pytest.raises(ValueError, match=r"resonance_threshold \(0.0\) must be > 0"):
        ScatteringRouter(4, resonance_threshold=0.0)
    router = ScatteringRouter(4)
    for bad in (torch.zeros(3, 2), torch.zeros(1, 3, 3), torch.zeros(1, 0, 2), torch.zeros(1, 3, 2, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"G_ii \(.*\) torch.* must be float \[batch, sequence >= 1, 2\]"):
            router(bad)
    with pytest.raises(ValueError, match=r"D_eps \(3, 2\) torch.float32 must be float"):
        router.detect_resonances(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"potential \(None\) must be given"):
        router.compute_spectral_shift(torch.tensor(0.0))
    with pytest.raises(ValueError, match=r"eta \(0.0\) must be > 0"):
        router.compute_spectral_shift(0.0, potential=torch.zeros(1, 3), eta=0.0)
    with pytest.raises(ValueError, match=r"potential \(3,\) must be \[batch, sequence\]"):
        router.compute_spectral_shift(0.0, potential=torch.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        router.compute_spectral_shift(0.0, potential=torch.full((1, 3), math.nan))
