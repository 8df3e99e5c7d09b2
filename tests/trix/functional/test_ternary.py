import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.functional.ternary import absmean_codes, absmean_ternary, straight_through, threshold_ternary, weight_of_codes


def test_absmean_matches_the_formula_row_by_row() -> None:
    weight = torch.tensor([[0.1, -0.4, 1.0, -0.1], [2.0, 2.0, -2.0, 2.0]])
    codes, scale = absmean_codes(weight)
    assert scale.tolist() == pytest.approx([0.4, 2.0])
    assert codes.tolist() == [[0, -1, 1, 0], [1, 1, -1, 1]]


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 1000))
def test_absmean_codes_are_ternary_and_every_nonzero_row_has_one(rows: int, columns: int, seed: int) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    codes, scale = absmean_codes(weight)
    assert set(codes.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert (codes.abs().sum(-1) >= 1).all()
    assert (scale > 0).all()


def test_a_row_of_zeros_has_code_zero_and_no_nan() -> None:
    codes, scale = absmean_codes(torch.zeros(2, 3))
    assert codes.eq(0).all()
    assert (codes * scale[:, None]).isfinite().all()


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 1000))
def test_a_weight_made_of_codes_and_scales_has_them(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (2, rows, columns), generator=generator).float()
    scale = torch.rand(2, rows, generator=generator) + 0.01
    found_codes, found_scale = absmean_codes(weight_of_codes(codes, scale))
    assert torch.equal(found_codes, codes)
    is_any = codes.ne(0).any(dim=-1)
    torch.testing.assert_close(found_scale[is_any], scale[is_any], rtol=1e-6, atol=0)


def test_scaling_a_weight_scales_its_ternary_value() -> None:
    weight = torch.randn(4, 16, dtype=torch.float64)
    torch.testing.assert_close(absmean_ternary(weight * 8.0), absmean_ternary(weight) * 8.0)


def test_gradients_pass_straight_through() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    factor = torch.randn(3, 5)
    (absmean_ternary(weight) * factor).sum().backward()
    assert torch.equal(weight.grad, factor)
    raw = torch.randn(3, 5, requires_grad=True)
    (threshold_ternary(raw, 0.3) * factor).sum().backward()
    assert torch.equal(raw.grad, factor)


def test_threshold_is_exclusive_and_exact() -> None:
    value = torch.tensor([0.3, 0.31, -0.31, 0.0, -0.3])
    assert threshold_ternary(value, 0.3).tolist() == [0.0, 1.0, -1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"threshold \(-1\) must be >= 0"):
        threshold_ternary(value, -1)


def test_straight_through_forward_is_exact() -> None:
    # value + (quantised - value) is 0.99999994 here.
    value = torch.tensor([0.1, 3e7])
    assert torch.equal(straight_through(torch.ones(2), value), torch.ones(2))
