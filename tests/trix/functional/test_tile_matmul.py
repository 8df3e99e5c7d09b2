import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.functional.gates import Gate
from trix.functional.packing import pack_ternary
from trix.functional.tile_matmul import (
    group_tokens,
    grouped_linear,
    select_top_k,
    signature_route,
    ternary_tile_matmul,
)


def reference(x: torch.Tensor, weight: torch.Tensor, tile_idx: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tk,tnk->tn", x, weight[tile_idx])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 30), st.integers(1, 6), st.integers(1, 20), st.integers(1, 20), st.integers(0, 9))
def test_grouped_product_equals_gathering_each_tokens_matrix(tokens: int, tiles: int, n: int, k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    tile_idx = torch.randint(0, tiles, (tokens,), generator=generator)
    x = torch.randn(tokens, k, generator=generator, dtype=torch.float64)
    weight = torch.randn(tiles, n, k, generator=generator, dtype=torch.float64)
    groups = group_tokens(tile_idx, tiles)
    y = grouped_linear(x[groups.order], weight, groups.ends)[groups.inverse]
    torch.testing.assert_close(y, reference(x, weight, tile_idx))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("sizes", [(16, 32), (7, 5)])  # the second is not aligned to 16 bytes
def test_grouped_product_in_every_dtype(dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    n, k = sizes
    tile_idx = torch.tensor([2, 0, 2, 2, 0])  # tile 1 gets no token
    x, weight = torch.randn(5, k).to(dtype), torch.randn(3, n, k).to(dtype)
    groups = group_tokens(tile_idx, 3)
    y = grouped_linear(x[groups.order], weight, groups.ends)[groups.inverse]
    assert y.dtype == dtype
    exact = reference(x.double(), weight.double(), tile_idx)
    assert (y.double() - exact).abs().max() <= 2 * k * torch.finfo(dtype).eps * exact.abs().max()


def test_gradients_of_the_grouped_product() -> None:
    groups = group_tokens(torch.tensor([1, 0, 1, 3]), 4)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, groups.ends), (x, weight))


def test_custom_operators_pass_torchs_own_checks() -> None:
    packed = pack_ternary(torch.randint(-1, 2, (3, 4, 6)))
    tile_idx = torch.tensor([0, 2, 2])
    torch.library.opcheck(ternary_tile_matmul, (torch.randn(3, 6), packed, torch.rand(3, 4), tile_idx))
    for gate in Gate:
        arguments = (torch.randn(3, 6), packed[0], torch.zeros(4), torch.zeros(4), 2, int(gate), 0.3)
        torch.library.opcheck(signature_route, arguments)


def test_ternary_tile_matmul_is_codes_times_scale() -> None:
    codes = torch.randint(-1, 2, (3, 4, 6))
    x, scale, tile_idx = torch.randn(5, 6), torch.rand(3, 4), torch.tensor([0, 2, 2, 1, 0])
    expected = reference(x, codes * scale[..., None], tile_idx)
    torch.testing.assert_close(ternary_tile_matmul(x, pack_ternary(codes), scale, tile_idx), expected)
    alone = ternary_tile_matmul(x, pack_ternary(codes[:1]), scale[:1], torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(alone, x @ (codes[0] * scale[0, :, None]).T)


def test_ties_go_to_the_lowest_index() -> None:
    score = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert select_top_k(score, 1).tolist() == [[1], [0]]
    assert select_top_k(score, 3).tolist() == [[1, 2, 4], [0, 1, 2]]


def test_route_selects_with_the_bias_and_reports_without_it() -> None:
    signatures = torch.tensor([[1, 0], [0, 1]])
    packed, bias = pack_ternary(signatures), torch.tensor([0.0, 5.0])
    tile_idx, weight, score = signature_route(torch.tensor([[2.0, 1.0]]), packed, bias, torch.zeros(2), 1, Gate.SIGMOID, 0.3)
    assert tile_idx.tolist() == [[1]]
    assert score.tolist() == [[2.0, 1.0]]
    torch.testing.assert_close(weight, torch.tensor([[1.0]]).sigmoid())


@pytest.mark.parametrize("width", [255, 256, 512, 1024])
def test_the_best_tile_of_many_is_the_first_of_those_that_tie(width: int) -> None:
    torch.manual_seed(width)
    score = torch.randint(0, 4, (2, 40, width)).float()  # ties everywhere, within chunks and across
    score[0, 0] = -torch.inf
    score[0, 1, 77] = torch.nan
    assert torch.equal(select_top_k(score, 1), score.argmax(dim=-1, keepdim=True))
    assert select_top_k(score[:, :0], 1).shape == (2, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_of_an_empty_group_is_zero(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 16, 8, dtype=dtype, requires_grad=True)
    x = torch.randn(6, 8, dtype=dtype)
    y = grouped_linear(x, weight, torch.tensor([2, 2, 5, 5], dtype=torch.int32), has_rest=True)
    grad = torch.randn_like(y)
    (weight_grad,) = torch.autograd.grad(y, weight, grad)
    none = torch.zeros(16, 8, dtype=dtype)
    torch.testing.assert_close(weight_grad, torch.stack([grad[:2].T @ x[:2], none, grad[2:5].T @ x[2:5], none]))


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60), st.sampled_from([(16, 8), (33, 7), (128, 64)]), st.data())
def test_in_blocks_a_row_has_one_answer_whatever_shares_its_group(
    num_rows: int, num_before: int, num_after: int, sizes: tuple[int, int], data: st.DataObject
) -> None:
    width, num_outputs = sizes
    weight, row = torch.randn(3, num_outputs, width), torch.randn(1, width)
    place = num_before + data.draw(st.integers(0, num_rows - 1))
    x = torch.randn(num_before + num_rows + num_after, width)
    x[place] = row
    ends = torch.tensor([num_before, num_before + num_rows, len(x)], dtype=torch.int32)
    alone = grouped_linear(row, weight, torch.tensor([0, 1, 1], dtype=torch.int32), in_blocks=True)
    y = grouped_linear(x, weight, ends, in_blocks=True)
    assert torch.equal(y[place], alone[0])
    torch.testing.assert_close(y, grouped_linear(x, weight.requires_grad_(), ends).detach(), rtol=1e-5, atol=1e-4)


def test_in_blocks_weights_are_not_copied_where_rows_fill_vector_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply, weight, places = torch.mm, torch.randn(3, 8, 32), []

    def noted(rows: torch.Tensor, matrix: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        places.append(matrix.untyped_storage().data_ptr())
        return multiply(rows, matrix, out=out)

    monkeypatch.setattr(torch, "mm", noted)
    grouped_linear(torch.randn(1, 32), weight, torch.tensor([0, 1, 1], dtype=torch.int32), in_blocks=True)
    assert places == [weight.untyped_storage().data_ptr()]


def test_rows_after_the_last_group_are_zero_in_blocks() -> None:
    ends = torch.tensor([2, 5], dtype=torch.int32)
    y = grouped_linear(torch.randn(6, 8), torch.randn(2, 4, 8), ends, has_rest=True, in_blocks=True)
    assert y[:5].all()
    assert not y[5].any()
