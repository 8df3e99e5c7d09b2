"""BitLinear, BitNet's linear layer, against its arithmetic written in numpy. Legend: T tokens, N rows, K columns."""

import numpy as np
import pytest
import torch

from trix.functional.packing import pack_ternary
from trix.functional.tile_matmul import ternary_tile_matmul_8bit
from trix.nn import TernaryWeight, pack_model, unpack_model
from trix.nn.bit_linear import BitLinear


def random_layer(num_rows: int = 6, num_columns: int = 37, has_bias: bool = False) -> tuple[BitLinear, np.ndarray]:
    """A layer, and its float64 weights."""
    code_NK = torch.randint(-1, 2, (num_rows, num_columns), dtype=torch.int8)
    bias_N = torch.randn(num_rows) if has_bias else None
    return BitLinear(code_NK, torch.tensor(0.3), bias_N), code_NK.numpy() * np.float64(np.float32(0.3))


def reference(x: np.ndarray, weight_NK: np.ndarray) -> np.ndarray:
    largest = np.maximum(np.abs(x).max(axis=-1, keepdims=True), np.float32(1e-5))
    return (np.rint(x * (np.float32(127) / largest)) @ weight_NK.T) * (largest / np.float64(127))


@pytest.mark.parametrize("size", [100.0, 1.0, 1e-4, 1.1e-5, 0.9e-5, 1e-6, 1e-9, 0.0])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_bitnets_arithmetic(size: float, has_bias: bool) -> None:
    """Also for tokens below 1e-5, which are rounded to coarser steps."""
    torch.manual_seed(0)
    layer, weight_NK = random_layer(has_bias=has_bias)
    x = torch.randn(2, 5, 37) * size
    expected = reference(x.numpy(), weight_NK)
    found = layer(x).numpy() - (layer.bias.numpy() if has_bias else 0)
    assert found.shape == (2, 5, 6)
    tolerance = 1e-6 * np.abs(expected).max() + (1e-6 if has_bias else 0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_ties_go_to_even() -> None:
    layer = BitLinear(torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]]), torch.tensor(1.0))
    np.testing.assert_array_equal(layer(torch.tensor([[0.5, 1.5, -2.5, 127.0]])).numpy(), [[0, 2, -2]])


def test_a_scale_per_row_and_the_dtype_of_x() -> None:
    layer = BitLinear(torch.eye(3, 4, dtype=torch.int8), torch.tensor([1.0, 2.0, 3.0]))
    y = layer(torch.tensor([[127.0, 1.0, -1.0, 0.0]], dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert y.tolist() == [[127.0, 2.0, -3.0]]


def test_it_is_always_packed() -> None:
    layer, _ = random_layer()
    x = torch.randn(4, 37)
    before = layer(x)
    assert isinstance(layer, TernaryWeight)
    assert layer.is_packed
    torch.testing.assert_close(pack_model(unpack_model(layer))(x), before, rtol=0, atol=0)
    other, _ = random_layer()
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), before, rtol=0, atol=0)


def test_codes_must_be_ternary() -> None:
    with pytest.raises(ValueError, match=r"codes must be in \{-1, 0, 1\}, got 2"):
        BitLinear(torch.tensor([[2, 0]]), torch.tensor(1.0))


def test_near_ties_are_counted() -> None:
    layer = BitLinear(torch.zeros(1, 5, dtype=torch.int8), torch.tensor(1.0))
    assert layer.num_near_ties(torch.tensor([[127.0, 0.5, -1.5, 0.501, 7.0], [127.0, 0.50001, 1.0, 2.0, 3.3]])) == 3


def test_the_operator_is_one_of_torch() -> None:
    packed, tile_idx = pack_ternary(torch.randint(-1, 2, (2, 4, 6))), torch.tensor([0, 1, 1])
    torch.library.opcheck(ternary_tile_matmul_8bit, (torch.randn(3, 6), packed, torch.rand(2, 4), tile_idx, 1e-5))
