import pytest
import torch
import torch.nn.functional as F

from trix import TriXLinear
from trix.functional.ternary import absmean_codes


def test_output_is_codes_times_scale() -> None:
    layer = TriXLinear(6, 8, bias=True)
    torch.nn.init.normal_(layer.bias)
    codes, scale = absmean_codes(layer.weight)
    x = torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x), x @ (codes * scale[:, None]).T + layer.bias)


def test_signatures_of_the_layer_and_of_its_tiles() -> None:
    layer = TriXLinear(5, 8, num_tiles=4)
    codes, _ = absmean_codes(layer.weight)
    assert torch.equal(layer.get_signature(), codes.sum(0).sign())
    assert torch.equal(layer.get_tile_signatures()[1], codes[2:4].sum(0).sign())


@pytest.mark.parametrize("in_features", [8, 7])
def test_packing_keeps_the_function_and_drops_the_float_weight(in_features: int) -> None:
    layer = TriXLinear(in_features, 8, bias=True)
    x = torch.randn(4, in_features)
    before, signature = layer(x), layer.get_signature()
    layer.pack()
    assert not any(parameter.dim() == 2 for parameter in layer.parameters())
    torch.testing.assert_close(layer(x), before)
    assert torch.equal(layer.get_signature(), signature)
    layer.pack()  # idempotent
    layer.unpack()
    torch.testing.assert_close(layer(x), before)
    codes = layer.codes_and_scale()[0]
    layer.pack()
    assert torch.equal(layer.codes_and_scale()[0], codes)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_packing_keeps_the_dtype(dtype: torch.dtype) -> None:
    layer = TriXLinear(16, 8).to(dtype)
    x = torch.randn(4, 16).to(dtype)
    before = layer(x)
    layer.pack()
    torch.testing.assert_close(layer(x), before)
    layer.unpack()
    torch.testing.assert_close(layer(x), before)


@pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter")
def test_a_packed_state_loads_to_where_the_layer_is() -> None:
    source, target = TriXLinear(8, 8), TriXLinear(8, 8)
    source.pack()
    target.pack()
    target.to("meta").load_state_dict(source.state_dict())
    assert {value.device.type for value in target.state_dict().values()} == {"meta"}


def test_packed_weights_take_a_sixteenth() -> None:
    layer = TriXLinear(4096, 256)
    float_bytes = layer.weight.numel() * 4
    layer.pack()
    packed_bytes = sum(value.numel() * value.element_size() for value in layer.state_dict().values())
    assert float_bytes / packed_bytes > 15.9


@pytest.mark.parametrize("from_packed", [True, False])
@pytest.mark.parametrize("to_packed", [True, False])
def test_a_state_dict_of_either_mode_loads_into_either(from_packed: bool, to_packed: bool) -> None:
    source, target = TriXLinear(7, 8, bias=True), TriXLinear(7, 8, bias=True)
    if from_packed:
        source.pack()
    if to_packed:
        target.pack()
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 7)
    assert torch.equal(target(x), source(x))
    assert target.is_packed == from_packed


def test_a_foreign_packed_state_is_refused() -> None:
    source = TriXLinear(8, 8)
    source.pack()
    state = source.state_dict()
    with pytest.raises(ValueError, match=r"packed \(8, 2\) and row_scale \(8,\) must be \(8, 3\) and \(8,\)"):
        TriXLinear(12, 8).load_state_dict(state)
    state["packed"][0, 0] = 0b11
    with pytest.raises(ValueError, match="reserved field 11"):
        TriXLinear(8, 8).load_state_dict(state)


def test_rows_that_do_not_divide_by_tiles_are_refused() -> None:
    with pytest.raises(ValueError, match=r"out_features \(10\) must be divisible by num_tiles \(4\)"):
        TriXLinear(8, 10)


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    target = torch.randint(-1, 2, (4, 8)).float()
    layer = TriXLinear(8, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    x = torch.randn(256, 8)
    losses = []
    for _ in range(200):
        loss = F.mse_loss(layer(x), x @ target.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
