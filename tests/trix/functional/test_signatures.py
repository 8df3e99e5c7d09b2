import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.functional.signatures import (
    differentiable_diversity,
    pairwise_difference,
    signature_diversity,
    signature_diversity_loss,
    signature_scores,
    signatures_from_codes,
)
from trix.functional.ternary import threshold_ternary


def ternary(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_signature_is_the_sign_of_the_column_votes() -> None:
    codes = torch.tensor([[1.0, -1, 0, 1], [1, -1, 0, -1], [0, -1, 0, 0]])
    assert signatures_from_codes(codes).tolist() == [1, -1, 0, 0]


def test_score_is_agreement_per_active_dimension() -> None:
    signatures = torch.tensor([[1.0, -1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    x = torch.tensor([[2.0, -2, 7, 0]])
    assert signature_scores(x, signatures).tolist()[0] == pytest.approx([4 / 2**0.5, 7 / 2, 0.0])
    with pytest.raises(ValueError, match=r"last dimension of x \(3\) must equal the signatures' \(4\)"):
        signature_scores(x[:, :3], signatures)


def test_scores_of_unit_activations_have_unit_deviation_whatever_the_width() -> None:
    for width in (64, 1024):
        scores = signature_scores(torch.randn(4000, width), ternary(8, width))
        assert scores.std(dim=0).mean().item() == pytest.approx(1.0, abs=0.05)


def loop_diversity(signatures: torch.Tensor) -> float:
    """The definition, pair by pair."""
    pairs = [
        (signatures[i] != signatures[j]).float().mean().item()
        for i in range(len(signatures))
        for j in range(i + 1, len(signatures))
    ]
    return sum(pairs) / len(pairs)


@given(st.integers(2, 9), st.integers(1, 40), st.integers(0, 99))
def test_diversity_equals_the_loop_over_pairs(num_tiles: int, width: int, seed: int) -> None:
    signatures = ternary(num_tiles, width, seed=seed)
    assert signature_diversity(signatures).item() == pytest.approx(loop_diversity(signatures), abs=1e-5)
    difference = pairwise_difference(signatures)
    assert difference.diagonal().abs().max() < 1e-6
    assert torch.equal(difference, difference.T)


def test_diversity_of_copies_and_of_one_tile_is_zero() -> None:
    assert signature_diversity(ternary(1, 16).repeat(5, 1)).item() == pytest.approx(0.0, abs=1e-6)
    assert signature_diversity(ternary(1, 16)).item() == 0.0


@given(st.integers(2, 7), st.integers(1, 20), st.integers(0, 99))
def test_differentiable_diversity_has_the_true_value(num_tiles: int, width: int, seed: int) -> None:
    raw = torch.randn(num_tiles, width, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    value = differentiable_diversity(raw, 0.3)
    assert value.item() == pytest.approx(signature_diversity(threshold_ternary(raw, 0.3)).item(), abs=1e-5)
    value.backward()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("centre", [0.0, 1.0, 30.0])
def test_steps_on_the_diversity_loss_raise_the_true_diversity(centre: float) -> None:
    torch.manual_seed(0)
    common = centre * torch.randn(1, 64).sign()
    raw = (common + 0.05 * torch.randn(8, 64)).requires_grad_()  # near copies of one tile, some far from the threshold
    optimizer = torch.optim.Adam([raw], lr=max(0.02, 0.01 * centre))
    history = []
    for _ in range(400):
        loss = signature_diversity_loss(raw, 0.3)
        history.append(signature_diversity(threshold_ternary(raw.detach(), 0.3)).item())
        assert loss.item() == pytest.approx(max(0.0, 0.5 - history[-1]), abs=1e-5)
        if loss.item() == 0.0:
            break
        optimizer.zero_grad()
        loss.backward()
        assert raw.grad.abs().sum() > 0
        optimizer.step()
    assert history[0] < 0.2
    assert history[-1] >= 0.5


def test_diversity_loss_leaves_diverse_signatures_alone() -> None:
    raw = torch.randn(6, 50, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = signature_diversity_loss(raw, 0.3, target_diversity=0.5)
    loss.backward()
    assert loss.item() == 0.0
    assert raw.grad.eq(0).all()
    assert signature_diversity_loss(raw[:1], 0.3).item() == 0.0  # one tile has nothing to differ from
    with pytest.raises(ValueError, match=r"target_diversity \(1.5\) must be >= 0 and <= 1"):
        signature_diversity_loss(raw, 0.3, target_diversity=1.5)


def test_scores_have_the_gradient_of_their_formula() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    signatures = torch.randint(-1, 2, (4, 5)).double().requires_grad_()
    factor = signatures.detach().ne(0).sum(dim=-1).clamp_min(1).rsqrt()
    grad = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = torch.autograd.grad((x @ signatures.T) * factor, (x, signatures), grad)
    for ours, plain in zip(torch.autograd.grad(signature_scores(x, signatures), (x, signatures), grad), expected, strict=True):
        torch.testing.assert_close(ours, plain)


def test_a_single_token_and_autocast_are_scored_and_differentiated() -> None:
    signatures = torch.randn(3, 8).sign()
    x = torch.randn(8, requires_grad=True)
    score = signature_scores(x, signatures)
    assert score.shape == (3,)
    score.sum().backward()
    torch.testing.assert_close(x.grad, signatures.sum(dim=0) / 8**0.5)
    batch = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        scores = signature_scores(batch, signatures)
    scores.sum().backward()
    assert scores.dtype == torch.float32
    assert batch.grad is not None
