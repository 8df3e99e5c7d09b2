import math
from typing import Any

import pytest
import torch

from trix.resnet_bk.potential import PrimeBumpPotential


def by_hand(x: float, n_seq: int, epsilon: float, k_max: int) -> float:
    primes = [p for p in range(2, n_seq) if all(p % q for q in range(2, p))]
    return sum(
        math.log(p) / p ** (k * (0.5 + epsilon)) * epsilon**-0.5 * math.exp(-((x - k * math.log(p)) ** 2) / (2 * epsilon))
        for p in primes
        for k in range(1, k_max + 1)
    )


@pytest.mark.parametrize("positions", ["uniform", "index", "log1p"])
def test_the_potential_is_the_sum_of_its_bumps(positions: Any) -> None:
    place = {"uniform": lambda j: j * math.log(30) / 29, "index": float, "log1p": math.log1p}[positions]
    v = PrimeBumpPotential(30, 0.6, 2, positions=positions)(torch.zeros(2, 30, 4, dtype=torch.float64))
    expected = torch.tensor([by_hand(place(j), 30, 0.6, 2) for j in range(30)], dtype=torch.float64)
    torch.testing.assert_close(v, expected.expand(2, 30), rtol=1e-12, atol=1e-14)


def test_the_seeds_example() -> None:
    v = PrimeBumpPotential(n_seq=512, epsilon=1.0)(torch.randn(8, 512, 256))
    assert v.shape == (8, 512)
    assert v.dtype == torch.float32


@pytest.mark.parametrize("change", [{"epsilon": 0.5}, {"k_max": 1}, {"scale": 0.02}, {"positions": "index"}, {"n_seq": 64}])
def test_every_argument_changes_the_potential(change: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"n_seq": 32}
    x = torch.zeros(1, 32, 4)
    assert not torch.equal(PrimeBumpPotential(**arguments)(x), PrimeBumpPotential(**arguments | change)(x))


def test_primes_and_coefficients() -> None:
    potential = PrimeBumpPotential(30, epsilon=0.5)
    assert potential.get_prime_indices() == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]
    assert PrimeBumpPotential(29).get_prime_indices()[-1] == 23  # below n_seq, not up to it
    assert PrimeBumpPotential(1).get_prime_indices() == []
    assert potential.compute_alpha_coefficients(3, 2) == pytest.approx(math.log(3) / 9)
    assert PrimeBumpPotential(4, epsilon=1e6).compute_alpha_coefficients(3, 3) == 0.0


def test_the_learned_part_starts_at_0_and_learns_from_each_token_alone() -> None:
    fixed, learned = PrimeBumpPotential(16), PrimeBumpPotential(16, d_model=4)
    x = torch.randn(2, 16, 4, requires_grad=True)
    assert torch.equal(learned(x), fixed(x))
    learned(x).sum().backward()
    assert learned.projection.weight.grad.abs().sum() > 0
    torch.nn.init.ones_(learned.projection.weight)
    (grad,) = torch.autograd.grad(learned(x)[0, 3], x)
    assert grad[0, 3].eq(1).all()
    assert grad.count_nonzero() == 4


def test_a_shorter_text_meets_the_same_potential() -> None:
    potential = PrimeBumpPotential(64)
    whole = potential(torch.zeros(1, 64, 4))
    assert torch.equal(potential(torch.zeros(1, 10, 4)), whole[:, :10])


def test_prime_bumps_are_not_gue() -> None:
    found = PrimeBumpPotential(2600).verify_gue_statistics()
    assert set(found) == {"mean_gap_ratio", "ks_gue", "ks_goe", "ks_poisson", "n", "closest"}
    assert found["n"] >= 2000
    assert found["closest"] == "none"
    assert found["mean_gap_ratio"] == pytest.approx(0.955, abs=0.002)
    assert found["ks_gue"] == pytest.approx(0.48, abs=0.01)
    assert found["ks_poisson"] == pytest.approx(0.58, abs=0.01)


def test_a_state_dict_holds_what_is_learned_alone() -> None:
    potential, other = PrimeBumpPotential(16, d_model=4), PrimeBumpPotential(16, d_model=4)
    torch.nn.init.normal_(potential.projection.weight)
    other.load_state_dict(potential.state_dict())
    x = torch.randn(2, 16, 4)
    assert torch.equal(other(x), potential(x))
    assert set(potential.state_dict()) == {"projection.weight", "projection.bias"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_seq": 0}, r"n_seq \(0\) and k_max \(3\) must be >= 1"),
        ({"k_max": 0}, r"n_seq \(8\) and k_max \(0\) must be >= 1"),
        ({"epsilon": 0.0}, r"epsilon \(0.0\) must be > 0 and finite"),
        ({"epsilon": math.nan}, r"epsilon \(nan\) must be > 0 and finite"),
        ({"scale": math.inf}, r"scale \(inf\) must be finite"),
        ({"positions": "log"}, r"positions \('log'\) must be one of uniform, index, log1p"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrimeBumpPotential(**{"n_seq": 8} | arguments)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 9, 4), r"sequence of x \(9\) must be >= 1 and <= n_seq \(8\)"),
        (torch.zeros(1, 0, 4), r"sequence of x \(0\) must be >= 1 and <= n_seq \(8\)"),
        (torch.zeros(8, 4), r"x \(8, 4\) torch.float32 must be float \[batch, sequence, width\]"),
        (torch.zeros(1, 8, 4, dtype=torch.int64), r"x \(1, 8, 4\) torch.int64 must be float"),
        (torch.zeros(1, 8, 5), r"width of x \(5\) must equal d_model \(4\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrimeBumpPotential(8, d_model=4)(x)


def test_bad_coefficients_and_too_few_sites_are_refused() -> None:
    with pytest.raises(ValueError, match=r"p \(1\) must be >= 2 and k \(0\) >= 1"):
        PrimeBumpPotential(8).compute_alpha_coefficients(1, 0)
    with pytest.raises(ValueError, match=r"eigenvalues without the ends \(8\) must be >= 32"):
        PrimeBumpPotential(8).verify_gue_statistics()
