"""Layers that read one code share a SignatureRoute in the file; it answers, is read and is edited as if each had its own."""

import copy
from pathlib import Path

import exported_models
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from exported_models import CONTEXT, VOCABULARY, Exported
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper
from packed_models import route_inputs

from ort_ops.export import export_language_model
from ort_ops.file_format import ModelFileError
from ort_ops.graph import join_routes
from ort_ops.library import session_options
from ort_ops.operators import fallback_functions
from ort_ops.operators.signature_route import ADAPTIVE, SIGMOID, SOFTMAX
from ort_ops.runtime import ExportedModel
from ort_ops.schema import DOMAIN, OPSET_VERSION
from ort_ops.signature_layers import read_model
from ort_ops.surgery import Edit, operate_on_file
from trix.nn import FFNConfig, LanguageModel, routed_layers
from trix.whole_file import write_whole

pytestmark = pytest.mark.usefixtures("native_library")
CONTEXT_ROUTED = FFNConfig(num_tiles=5, top_k=2, route_on="context", signatures="learned")
NUM_LAYERS = 3
SIGNATURE_D = torch.tensor([1, 0, -1, 0, 1] * 4, dtype=torch.int8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported_models.export(tmp_path_factory.mktemp("joined"), CONTEXT_ROUTED, NUM_LAYERS)


def routes(graph: GraphProto) -> list[NodeProto]:
    return [node for node in graph.node if node.op_type == "SignatureRoute"]


def assert_answers_as(path: Path, model: LanguageModel) -> None:
    token_BT = torch.randint(0, len(VOCABULARY), (9, CONTEXT), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, infos, _ = model(token_BT, return_routing=True)
    tile_idx_BTLK = torch.stack([info["tile_idx"] for info in infos], dim=2)
    for use_library in (True, False):
        logits, tile_idx = ExportedModel(path, use_library).run(token_BT.numpy())
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-3, rtol=1e-3)
        np.testing.assert_array_equal(tile_idx, tile_idx_BTLK.numpy())


def test_all_layers_share_one_route_and_choose_as_torch_does(exported: Exported) -> None:
    assert [node.op_type for node in routes(onnx.load(exported.path).graph)] == ["SignatureRoute"]
    assert exported.report.parity.num_unexplained == 0
    assert exported.report.stepwise_parity is not None
    assert exported.report.stepwise_parity.num_unexplained == 0
    assert_answers_as(exported.path, exported.model)


def test_onnxruntime_joins_the_constants_when_it_loads_the_file(exported: Exported, tmp_path: Path) -> None:
    options = session_options()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    ort.InferenceSession(str(exported.path), options)
    graph = onnx.load(tmp_path / "optimised.onnx").graph
    (route,) = routes(graph)
    assert set(route.input[1:]) <= {tensor.name for tensor in graph.initializer}


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_each_layer_is_read_and_edited_alone(exported: Exported, layer: int, tmp_path: Path) -> None:
    _, _, layers, records = read_model(exported.path)
    assert len(layers) == len(records) == NUM_LAYERS
    torch_layers = routed_layers(exported.model)
    for found, record, expected in zip(layers, records, torch_layers, strict=True):
        np.testing.assert_array_equal(found.signature_ED, expected.get_tile_signatures().numpy())
        np.testing.assert_allclose(found.bias_E, expected.router.balance_bias.detach().numpy())
        assert (found.top_k, record.kind, record.d_model) == (2, "TriXFFN", 20)
    inserted, removed = tmp_path / "inserted.onnx", tmp_path / "removed.onnx"
    operate_on_file(exported.path, inserted, Edit("insert", layer, 2, "concept", SIGNATURE_D.numpy()))
    operate_on_file(inserted, removed, Edit("remove", layer, 4, ""))
    model = copy.deepcopy(exported.model)
    routed_layers(model)[layer].insert_signature(2, SIGNATURE_D)
    assert_answers_as(inserted, model)
    routed_layers(model)[layer].remove_tile(4)
    assert_answers_as(removed, model)
    histories = [[entry["operation"] for entry in record.history] for record in read_model(removed)[3]]
    assert histories == [["insert", "remove"] if index == layer else [] for index in range(NUM_LAYERS)]


def test_a_layer_whose_attributes_differ_has_its_own_route_and_keeps_its_place(tmp_path: Path) -> None:
    model = exported_models.make_model(FFNConfig(num_tiles=5, max_k=2, route_on="context"), NUM_LAYERS)
    routed_layers(model)[1].router.confidence_threshold = 0.1
    held_out = torch.randint(0, len(VOCABULARY), (20 * CONTEXT,))
    path = tmp_path / "model.onnx"
    export_language_model(model, VOCABULARY, held_out, path)
    assert len(routes(onnx.load(path).graph)) == NUM_LAYERS
    for found, expected in zip(read_model(path)[2], routed_layers(model), strict=True):
        np.testing.assert_array_equal(found.signature_ED, expected.get_tile_signatures().numpy())
    assert_answers_as(path, model)


def test_a_file_whose_groups_and_constants_differ_in_number_is_refused(exported: Exported, tmp_path: Path) -> None:
    proto = onnx.load(exported.path)
    (route,) = routes(proto.graph)
    attribute = next(attribute for attribute in route.attribute if attribute.name == "num_groups")
    for wrong in (-1, 0, 2, 2**40):
        attribute.i = wrong
        write_whole(proto.SerializeToString(), tmp_path / "wrong.onnx")
        with pytest.raises(ModelFileError, match=rf"wrong.onnx: num_groups \({wrong}\) of node .* a Concat joins \(3\)"):
            read_model(tmp_path / "wrong.onnx")


SETTINGS = {"top_k": 2, "gate": SOFTMAX, "num_groups": 1}
FIRST = ("x", 6, SETTINGS)
# What each node reads, its number of tiles and its attributes; which of them are joined.
ROUTES = {
    "all": ([FIRST, FIRST, FIRST], [3]),
    "another input": ([FIRST, FIRST, ("z", 6, SETTINGS)], [2, 1]),
    "another number of tiles": ([("x", 7, SETTINGS), FIRST, FIRST], [1, 2]),
    "another attribute": ([FIRST, FIRST, ("x", 6, SETTINGS | {"top_k": 3}), FIRST, FIRST], [2, 1, 2]),
    "adaptive": ([("x", 6, SETTINGS | {"gate": ADAPTIVE})] * 2, [2]),
    "sigmoid, as of many tiles": ([("x", 6, SETTINGS | {"gate": SIGMOID})] * 2, [1, 1]),
}


def graph_of_routes(nodes: list[tuple[str, int, dict[str, int]]], rng: np.random.Generator) -> GraphProto:
    initializers, made, outputs = [], [], []
    for index, (x, num_tiles, attributes) in enumerate(nodes):
        inputs, _ = route_inputs(rng, 0, num_tiles, 20)
        names = [x, *(f"{name}_{index}" for name in ("signatures", "bias", "log_mass"))]
        initializers += [numpy_helper.from_array(inputs[name[: -len(f"_{index}")]], name) for name in names[1:]]
        made.append(
            helper.make_node("SignatureRoute", names, [f"tile_{index}", f"weight_{index}", ""], domain=DOMAIN, **attributes)
        )
        outputs += [helper.make_tensor_value_info(f"tile_{index}", TensorProto.INT64, None)]
        outputs += [helper.make_tensor_value_info(f"weight_{index}", TensorProto.FLOAT, None)]
    given = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", 20]) for name in ("x", "z")]
    return helper.make_graph(made, "g", given, outputs, initializers)


def answers(graph: GraphProto, rng: np.random.Generator, *, portable: bool) -> list[np.ndarray]:
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9, functions=fallback_functions())
    session = ort.InferenceSession(model.SerializeToString(), ort.SessionOptions() if portable else session_options())
    return session.run(None, {name: rng.standard_normal((4, 20), dtype=np.float32) for name in ("x", "z")})


@pytest.mark.parametrize("case", ROUTES)
def test_equal_routes_in_a_row_become_one_that_answers_alike(case: str) -> None:
    nodes, expected = ROUTES[case]
    graph = graph_of_routes(nodes, np.random.default_rng(0))
    joined = copy.deepcopy(graph)
    join_routes(joined)
    counts = [next(attribute.i for attribute in node.attribute if attribute.name == "num_groups") for node in routes(joined)]
    assert counts == expected
    for portable in (False, True):
        before, after = (answers(of, np.random.default_rng(1), portable=portable) for of in (graph, joined))
        for one, other in zip(before, after, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_route_whose_scores_are_read_stays() -> None:
    graph = graph_of_routes([FIRST, FIRST], np.random.default_rng(0))
    graph.node[1].output[2] = "score"
    before = copy.deepcopy(graph)
    join_routes(graph)
    assert graph == before
