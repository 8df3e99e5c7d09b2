"""``torch.onnx.export`` called by a user on a packed model, with the public table."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from ort_ops.export import translation_table
from ort_ops.library import session_options
from ort_ops.operators import fallback_functions
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN
from trix.functional.resolvent import Pair, resolvent_pivots
from trix.nn import HierarchicalTriXFFN, SparseLookupFFNv2, TriXFFN, TriXLinear, pack_model

pytestmark = pytest.mark.usefixtures("native_library")
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: TriXLinear(130, 70, num_tiles=2, bias=True),  # too large for torch's exporter to fold
    "tiles": lambda: TriXFFN(20, num_tiles=40, top_k=2),
    "clusters": lambda: HierarchicalTriXFFN(20, num_tiles=9),
    "lookup": lambda: SparseLookupFFNv2(20, 40, top_k=2),
}


@pytest.mark.parametrize("name", MODULES)
def test_the_table_alone_gives_a_file_that_runs_with_the_library(name: str) -> None:
    torch.manual_seed(0)
    packed = pack_model(MODULES[name]().eval())
    x = torch.randn(6, 130 if name == "linear" else 20)
    program = torch.onnx.export(packed, (x,), opset_version=18, custom_translation_table=translation_table(), verbose=False)
    assert program is not None
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    assert any(node.domain == DOMAIN for node in proto.graph.node)
    with torch.no_grad():
        answer = packed(x)
    expected = (answer[0] if isinstance(answer, tuple) else answer).numpy()
    for functions, options in (((), session_options()), (fallback_functions(), ort.SessionOptions())):
        proto.functions.extend(functions)
        options.log_severity_level = 3
        session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Pivots(nn.Module):
    """The pivots of rows of any number of axes, [..., 2, T]."""

    def forward(self, alpha: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha_re, alpha_im = alpha.unbind(-2)
        return resolvent_pivots(Pair(alpha_re, -softplus(alpha_im, 2.0, 1.0)), softplus(w))


@pytest.mark.parametrize("shape", [(), (3,), (2, 2), (2, 1, 3)], ids=str)
def test_pivots_of_rows_of_any_number_of_axes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(*shape, 2, 7), torch.randn(*shape, 7)
    program = torch.onnx.export(
        Pivots().eval(), inputs, opset_version=18, custom_translation_table=translation_table(), verbose=False
    )
    assert program is not None
    session = ort.InferenceSession(program.model_proto.SerializeToString(), session_options(), ["CPUExecutionProvider"])
    found = session.run(None, {value.name: x.numpy() for value, x in zip(session.get_inputs(), inputs, strict=True)})
    for part, expected in zip(found, Pivots()(*inputs), strict=True):
        np.testing.assert_allclose(part, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (33, 17), (2, 40, 20)], ids=str)
def test_rows_are_laid_in_panels_as_the_layout_says(shape: tuple[int, ...]) -> None:
    layer = TriXLinear(shape[-1], shape[-2], num_tiles=1)
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    module = (
        pack_model(layer.eval()) if len(shape) == 2 else pack_model(TriXFFN(shape[2], shape[0], shape[0] * shape[1]).eval())
    )
    x = torch.zeros(1, shape[-1])
    program = torch.onnx.export(module, (x,), opset_version=18, custom_translation_table=translation_table(), verbose=False)
    assert program is not None
    proto = program.model_proto
    node = next(node for node in proto.graph.node if node.op_type in ("TernaryTileMatMul", "TernaryFFN"))
    name = node.input[1 if len(shape) == 2 else 3]
    proto.graph.output.append(onnx.ValueInfoProto(name=name))
    session = ort.InferenceSession(proto.SerializeToString(), session_options(), providers=["CPUExecutionProvider"])
    found = session.run([name], {session.get_inputs()[0].name: x.numpy()})[0]
    weight = module if isinstance(module, TriXLinear) else module.tiles.up
    codes, _ = weight.codes_and_scale()
    np.testing.assert_array_equal(found, to_panels(codes.numpy().astype(np.int8).reshape(-1, *shape[-2:])))


def test_the_example_in_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert translation_table.__doc__ is not None
    exec(textwrap.dedent(translation_table.__doc__.split("Example:\n")[1]), {})
    for options in (session_options(), ort.SessionOptions()):
        session = ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
        source = session.get_inputs()[0]
        assert session.run(None, {source.name: np.zeros(source.shape, dtype=np.float32)})[0].shape == (2, 8, 32)
