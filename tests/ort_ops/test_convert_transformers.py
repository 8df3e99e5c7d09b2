"""Modules with transformers' BitLinear, exported to run natively; and the layer that they become, without transformers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ort_ops.convert import from_bitlinear
from ort_ops.export import ExportError, export
from ort_ops.file_format import Activations
from ort_ops.runtime import open_model
from trix.nn import TriXLinear
from trix.nn.bit_linear import BitLinear

NATIVE = {"activation_bits": 8, "group_size": 0, "min_magnitude": pytest.approx(1e-5)}


def tokens(num_columns: int) -> torch.Tensor:
    """Of all sizes, down to those below the smallest scale of BitNet."""
    return torch.randn(8, num_columns) * torch.tensor([[1.0], [100.0], [1e-3], [1.1e-5], [0.9e-5], [1e-6], [1e-9], [0.0]])


def products(path: Path) -> list[dict[str, Any]]:
    """The attributes of each ternary product in a file."""
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "TernaryTileMatMul"]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


def exported(module: nn.Module, x: torch.Tensor, path: Path) -> np.ndarray:
    export(module, x, path, input_names=["input"])
    (y,) = open_model(path).run_outputs({"input": x.numpy()}).values()
    return y


def random_layer() -> BitLinear:
    return BitLinear(torch.randint(-1, 2, (24, 70), dtype=torch.int8), torch.tensor(0.02), torch.randn(24))


def test_activations_are_its_own_whatever_the_others_have(tmp_path: Path) -> None:
    module = nn.Sequential(random_layer(), TriXLinear(24, 8))
    export(module, torch.randn(3, 70), tmp_path / "m.onnx", activations=Activations(8, 128))
    assert products(tmp_path / "m.onnx") == [NATIVE, {"activation_bits": 8, "group_size": 128, "min_magnitude": 0.0}]


def test_a_step_that_rounding_decides_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ort_ops.own_module.MAX_RELATIVE_DIFFERENCE", -1.0)
    x = torch.zeros(1, 70)
    x[0, :2] = torch.tensor([127.0, 0.5])
    with pytest.raises(ExportError, match="rounding decided between two steps of 8 bits 1 times: try other example inputs"):
        export(random_layer(), x, tmp_path / "m.onnx")


def test_what_holds_no_such_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear must hold a BitLinear or AutoBitLinear of transformers, it holds none"):
        from_bitlinear(nn.Linear(3, 4))


@pytest.fixture
def bitnet() -> Iterator[Any]:
    """Without its compiled parts, which take a C++ compiler and minutes."""
    pytest.importorskip("transformers", reason="converts modules of transformers")
    from transformers.integrations import bitnet

    with torch.compiler.set_stance("force_eager"):
        yield bitnet


def packed(bitnet: Any, has_bias: bool = False, use_rms_norm: bool = False) -> Any:
    layer = bitnet.BitLinear(70, 24, has_bias, dtype=torch.float32, use_rms_norm=use_rms_norm)
    layer.weight.copy_(bitnet.pack_weights(torch.randint(-1, 2, (24, 70))))
    layer.weight_scale.fill_(43.0)
    if has_bias:
        layer.bias.copy_(torch.randn(24))
    return layer


def automatic(bitnet: Any, online: bool, has_bias: bool = False) -> Any:
    layer = bitnet.AutoBitLinear(70, 24, has_bias, dtype=torch.float32, online_quant=online)
    if not online:
        layer.weight.data = torch.randint(-1, 2, (24, 70)).float()
        layer.weight_scale.fill_(0.02)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("kind", ["packed", "packed with bias", "online", "offline with bias"])
def test_a_layer_answers_as_that_of_transformers(tmp_path: Path, bitnet: Any, kind: str) -> None:
    """Each token within 1e-6 of its own largest output, also where max |x| < 1e-5."""
    torch.manual_seed(1)
    has_bias = kind.endswith("bias")
    layer = packed(bitnet, has_bias) if "packed" in kind else automatic(bitnet, kind == "online", has_bias)
    x = tokens(70)
    expected = layer(x).numpy()
    found = exported(from_bitlinear(layer), x, tmp_path / "m.onnx")
    assert products(tmp_path / "m.onnx") == [NATIVE]
    assert (np.abs(found - expected) <= 1e-6 * np.abs(expected).max(axis=1, keepdims=True)).all()


def test_a_norm_in_a_layer_comes_first(bitnet: Any) -> None:
    layer = packed(bitnet, use_rms_norm=True)
    layer.rms_norm.weight.data.uniform_(0.5, 2.0)
    x = torch.randn(8, 70)
    torch.testing.assert_close(from_bitlinear(layer)(x), layer(x), rtol=0, atol=1e-6 * float(layer(x).abs().max()))


def test_only_such_layers_change_and_the_module_itself_does_not(tmp_path: Path, bitnet: Any) -> None:
    torch.manual_seed(2)
    module = nn.ModuleDict({"first": packed(bitnet), "head": nn.Linear(24, 5), "same": nn.Identity()})
    module["same"] = module["first"]
    converted = from_bitlinear(module)
    assert isinstance(module["first"], bitnet.BitLinear)
    assert isinstance(converted["first"], BitLinear)
    assert converted["same"] is converted["first"]
    assert torch.equal(converted["head"].weight, module["head"].weight)
    assert converted["head"] is not module["head"]
    whole = nn.Sequential(converted["first"], converted["head"])
    x = tokens(70)
    expected = module["head"](module["first"](x)).detach().numpy()
    found = exported(whole, x, tmp_path / "m.onnx")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_feed_forward_layer_of_bitnet(tmp_path: Path, bitnet: Any) -> None:
    from transformers import BitNetConfig
    from transformers.models.bitnet.modeling_bitnet import BitNetMLP

    torch.manual_seed(3)
    mlp = BitNetMLP(BitNetConfig(hidden_size=70, intermediate_size=70, hidden_act="relu2"))
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = (bitnet.AutoBitLinear(70, 70, False, online_quant=True) for _ in range(3))
    x = torch.randn(4, 70)
    expected = mlp(x).detach().numpy()
    found = exported(from_bitlinear(mlp), x, tmp_path / "m.onnx")
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_layers_that_are_not_ternary_are_named(bitnet: Any) -> None:
    dense = bitnet.AutoBitLinear(70, 24, False)
    with pytest.raises(ValueError, match=r"0.weight must hold codes of \{-1, 0, 1\}: they were not unpacked"):
        from_bitlinear(nn.Sequential(dense))
    without_scale = packed(bitnet)
    without_scale.weight_scale.zero_()
    with pytest.raises(ValueError, match=r"1.weight_scale \(0.0\) must be > 0 and finite"):
        from_bitlinear(nn.Sequential(nn.Identity(), without_scale))
    reserved = packed(bitnet)
    reserved.weight[2, 3] = 0xFF
    with pytest.raises(ValueError, match=r"weight: byte \[2, 3\] \(0xff\) must hold only the codes 0, 1 and 2"):
        from_bitlinear(reserved)
