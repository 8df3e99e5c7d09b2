import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.functional.signatures import (
    pairwise_difference,
    signature_diversity,
    signature_scores,
    signatures_from_codes,
)


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
