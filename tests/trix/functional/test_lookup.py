"""Looked-up rows against the same formulas in plain autograd, and dropout's coin flips."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trix.functional.dropout import dropout_mask
from trix.functional.lookup import add_rows, hinge_rows


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("with_mask", [False, True])
def test_add_rows_and_its_gradients(with_mask: bool) -> None:
    torch.manual_seed(0)
    x, size, rows = drawn(7, 5), drawn(7), drawn(4, 5)  # some row is chosen twice, row 3 by none
    row_idx = torch.tensor([0, 2, 2, 1, 0, 2, 1])
    mask = torch.randint(0, 2, (7, 5), dtype=torch.int16) if with_mask else None
    expected = x + size.unsqueeze(1) * rows[row_idx] * (1 if mask is None else mask)
    torch.testing.assert_close(add_rows(x, size, rows, row_idx, mask), expected)
    assert torch.autograd.gradcheck(add_rows, (x, size, rows, row_idx, mask))
    (grad_rows,) = torch.autograd.grad(add_rows(x, size, rows, row_idx, mask).sum(), rows)
    assert (grad_rows[3] == 0).all()


def test_add_rows_rounds_once_to_the_dtype_of_x() -> None:
    torch.manual_seed(0)
    x, size, rows = drawn(7, 5, dtype=torch.bfloat16), drawn(7, dtype=torch.float32), drawn(4, 5, dtype=torch.bfloat16)
    row_idx = torch.randint(0, 4, (7,))
    y = add_rows(x, size, rows, row_idx)
    assert torch.equal(y, x + (size.unsqueeze(1) * rows[row_idx].float()).bfloat16())
    grads = torch.autograd.grad(y.float().sum(), (x, size, rows))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_hinge_rows_and_its_gradients() -> None:
    torch.manual_seed(0)
    grid_size = 3
    point, rows, row_idx = drawn(7, 2), drawn(4, 4 * grid_size + 1), torch.randint(0, 4, (7,))
    first, second, offset, height, base = rows[row_idx].split([grid_size] * 4 + [1], dim=1)
    crease = first * point[:, :1] + second * point[:, 1:] + offset
    torch.testing.assert_close(hinge_rows(point, rows, row_idx), (F.relu(crease) * height).sum(dim=1) + base.squeeze(1))
    assert torch.autograd.gradcheck(hinge_rows, (point, rows, row_idx))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99])
def test_dropout_mask_has_the_share_asked_for_and_mean_one(p: float) -> None:
    torch.manual_seed(0)
    mask, factor = dropout_mask(torch.Size([401, 999]), p, torch.device("cpu"))
    assert mask.shape == (401, 999)
    assert set(mask.unique().tolist()) <= {0, 1}
    assert factor == pytest.approx(1.0 / (1.0 - p), rel=1e-3)
    spread = (p * (1.0 - p) / mask.numel()) ** 0.5
    assert mask.double().mean().item() == pytest.approx(1.0 / factor, abs=5.0 * spread)
    for column in (0, 1, 2, 3):  # each quarter of a draw
        quarter = mask.flatten()[column::4].double()
        assert quarter.mean().item() == pytest.approx(1.0 / factor, abs=10.0 * spread)


def test_dropout_mask_follows_the_seed_and_takes_the_ends() -> None:
    shape, cpu = torch.Size([5, 7]), torch.device("cpu")
    masks = [(torch.manual_seed(seed), dropout_mask(shape, 0.5, cpu)[0])[1] for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    mask, factor = dropout_mask(shape, 1.0, cpu)
    assert (mask == 0).all()
    assert factor == 0.0
    assert dropout_mask(torch.Size([0, 7]), 0.5, cpu)[0].shape == (0, 7)
    with pytest.raises(ValueError, match=r"p \(1.5\) must be >= 0 and <= 1"):
        dropout_mask(shape, 1.5, cpu)
