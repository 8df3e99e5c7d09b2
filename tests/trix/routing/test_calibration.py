import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.routing.calibration import ScoreCalibrationSpline


def bent(num_knots: int = 8, seed: int = 0) -> ScoreCalibrationSpline:
    spline = ScoreCalibrationSpline(num_knots)
    with torch.no_grad():
        spline.increment.copy_(3.0 * torch.randn(num_knots - 1, generator=torch.Generator().manual_seed(seed)))
    return spline


def test_starts_as_the_sigmoid() -> None:
    scores = torch.linspace(-8.0, 8.0, 101)
    torch.testing.assert_close(ScoreCalibrationSpline()(scores), scores.sigmoid())


def test_runs_through_its_knots() -> None:
    spline = bent(5).double()
    knots = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    torch.testing.assert_close(spline.knots()[1:4], spline(knots.logit()))
    assert spline.knots()[[0, -1]].tolist() == [0.0, 1.0]
    torch.testing.assert_close(spline(knots.logit()), spline.increment.softmax(0).cumsum(0)[:3])
    torch.testing.assert_close(spline(torch.tensor([-50.0, 50.0]).double()), torch.tensor([0.0, 1.0]).double())


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.integers(0, 10_000), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_is_monotone_and_bounded_whatever_its_parameters(num_knots: int, seed: int, dtype: torch.dtype) -> None:
    spline = bent(num_knots, seed)
    scores = torch.cat([torch.linspace(-30.0, 30.0, 2001), torch.tensor([-1e30, 1e30])]).sort().values.to(dtype)
    gates = spline(scores)
    assert gates.min() >= 0.0
    assert gates.max() <= 1.0
    assert (gates.diff() >= 0.0).all()


def test_never_changes_the_winner() -> None:
    scores = torch.randn(200, 64)
    gates = bent(seed=3)(scores)
    winner = scores.argmax(dim=-1, keepdim=True)
    assert torch.equal(gates.gather(-1, winner), gates.amax(dim=-1, keepdim=True))


def test_gradients_are_those_of_the_formula() -> None:
    spline = bent().double()
    scores = torch.linspace(-4.0, 4.0, 13, dtype=torch.float64, requires_grad=True)  # between the knots
    increment = spline.increment.detach().clone().requires_grad_()

    def gates(scores: torch.Tensor, increment: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(spline, {"increment": increment}, (scores,))

    assert torch.autograd.gradcheck(gates, (scores, increment))


def test_a_high_score_still_has_a_gradient() -> None:
    scores = torch.tensor([8.0], requires_grad=True)
    ScoreCalibrationSpline()(scores).backward()
    assert scores.grad is not None
    assert scores.grad.item() > 1e-4


def test_shapes_and_sizes() -> None:
    assert ScoreCalibrationSpline(num_knots=2)(torch.randn(3, 0, 4)).shape == (3, 0, 4)
    assert ScoreCalibrationSpline()(torch.randn(4).bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"num_knots \(1\) must be >= 2"):
        ScoreCalibrationSpline(1)
