"""The regularisers of signatures in closed form against plain autograd, over several blocks of pairs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trix.functional import penalties
from trix.functional.penalties import signature_penalties


def reference(raw: Tensor) -> Tensor:
    ternary = torch.minimum(raw.abs(), (raw.abs() - 1.0).abs()).mean()
    active = (1.09 * raw.square() / (raw.square() + 0.09)).mean(dim=1)
    unit = F.normalize(raw, dim=1)
    num_pairs = max(len(raw) * (len(raw) - 1) // 2, 1)
    diversity = F.relu(unit @ unit.T - 0.5).triu(1).sum() / num_pairs
    return torch.stack([ternary, F.relu(active - 0.3).mean(), diversity])


@pytest.mark.parametrize("num_tiles", [1, 2, 7, 8, 9, 30])
@pytest.mark.parametrize("noise", [0.3, 5.0])  # nearly all pairs too close, or few of them
def test_values_and_gradients(num_tiles: int, noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties, "PAIR_BLOCK", 8)
    torch.manual_seed(num_tiles)
    raw = (torch.randn(6, dtype=torch.float64) + noise * torch.randn(num_tiles, 6, dtype=torch.float64)).requires_grad_()
    values, expected = torch.stack(signature_penalties(raw, 0.3, 0.3, 0.5)), reference(raw)
    torch.testing.assert_close(values, expected)
    for value, expected_value in zip(values, expected, strict=True):
        (grad,) = torch.autograd.grad(value, raw, retain_graph=True)
        (expected_grad,) = torch.autograd.grad(expected_value, raw, retain_graph=True)
        torch.testing.assert_close(grad, expected_grad)


def test_rows_of_zeros_are_near_to_none_and_get_no_diversity_gradient() -> None:
    raw = torch.zeros(3, 5)
    raw[0] = 1.0
    raw.requires_grad_()
    result = signature_penalties(raw, 0.3, 0.3, 0.5)
    assert result.diversity == 0.0
    (grad,) = torch.autograd.grad(torch.stack(result).sum(), raw)
    assert grad.isfinite().all()


def test_diversity_is_left_out_where_it_is_not_asked_for() -> None:
    raw = torch.ones(3, 5)
    assert signature_penalties(raw, 0.3, 0.3, 0.5).diversity == pytest.approx(0.5)
    assert signature_penalties(raw, 0.3, 0.3, 0.5, with_diversity=False).diversity == 0.0
