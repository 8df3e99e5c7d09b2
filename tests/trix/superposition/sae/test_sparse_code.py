"""Sparse codes against the same computation in full: values, gradients, and what is kept in memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trix.superposition.sae import sparse_code
from trix.superposition.sae.sparse_code import Select, SparseCode, entries_above, sparse_decode, sparse_encode, top_entries

NUM_LATENTS = 20


def parts(num_tokens: int = 7, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, W_enc, b_enc, centre, W_dec."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((num_tokens, width), (width, NUM_LATENTS), (NUM_LATENTS,), (width,), (NUM_LATENTS, width))
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def in_full(x: Tensor, encoder: Tensor, bias: Tensor, centre: Tensor, decoder: Tensor, select: Select) -> Tensor:
    pre = (x - centre) @ encoder + bias
    is_kept = torch.zeros_like(pre, dtype=torch.bool)
    is_kept[select(pre.detach())] = True
    return torch.where(is_kept, pre.relu(), 0.0) @ decoder


@pytest.mark.parametrize("select", [top_entries(3), top_entries(NUM_LATENTS), entries_above(0.5), entries_above(1e9)])
@pytest.mark.parametrize("rows", [2, 1024])
def test_values_and_gradients_are_those_of_the_computation_in_full(
    select: Select, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse_code, "ROWS", rows)
    ours, reference = parts(), parts()
    x_hat = sparse_decode(sparse_encode(*ours[:4], select), ours[4])
    expected = in_full(*reference, select)
    assert torch.allclose(x_hat, expected, atol=1e-12)
    upstream = torch.randn(x_hat.shape, generator=torch.Generator().manual_seed(1), dtype=x_hat.dtype)
    x_hat.backward(upstream)
    expected.backward(upstream)
    for mine, its in zip(ours, reference, strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert torch.allclose(mine.grad, its.grad, atol=1e-12)


def test_gradients_in_float32_are_right_to_a_millionth() -> None:
    ours, reference = parts(64, 16, torch.float32), parts(64, 16, torch.float32)
    sparse_decode(sparse_encode(*ours[:4], top_entries(4)), ours[4]).square().mean().backward()
    in_full(*reference, top_entries(4)).square().mean().backward()
    for mine, its in zip(ours, reference, strict=True):
        assert mine.grad is not None
        assert its.grad is not None
        assert float((mine.grad - its.grad).abs().max()) <= 1e-6 * max(float(its.grad.abs().max()), 1.0)


def test_gradcheck() -> None:
    x, *rest = parts(4)

    def step(*values: Tensor) -> Tensor:
        return sparse_decode(sparse_encode(*values[:4], top_entries(3)), values[4])

    assert torch.autograd.gradcheck(step, (x, *rest))


@settings(max_examples=30, deadline=None)
@given(active=st.integers(1, NUM_LATENTS), num_tokens=st.integers(1, 9))
def test_a_code_says_what_the_dense_latents_say(active: int, num_tokens: int) -> None:
    x, encoder, bias, centre, _ = parts(num_tokens)
    code = sparse_encode(x, encoder, bias, centre, top_entries(active))
    z = code.dense(NUM_LATENTS)
    assert (z > 0).sum(dim=1).max() <= active
    assert len(code.latent_M) == active * num_tokens
    pre = ((x - centre) @ encoder + bias).relu()
    assert torch.allclose(z.sort(dim=1).values[:, -active:], pre.sort(dim=1).values[:, -active:], atol=1e-12)


def test_tokens_without_entries_are_told_apart() -> None:
    code = SparseCode(torch.tensor([0, 0, 2, 2, 3]), torch.tensor([1, 0, 1]), torch.tensor([1.0, 2.0, 3.0]))
    assert code.tokens.tolist() == [1, 1, 3]
    assert code.dense(2).tolist() == [[0.0, 0.0], [2.0, 1.0], [0.0, 0.0], [0.0, 3.0]]
    assert sparse_decode(code, torch.eye(2)).tolist() == code.dense(2).tolist()
