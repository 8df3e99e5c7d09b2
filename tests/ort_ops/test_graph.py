import numpy as np
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ort_ops.graph import Activations, leave_out_unread, set_activations, unsqueeze_constants
from ort_ops.schema import DOMAIN

ROUTE_INPUTS = ["x", "matrix", "scale", "scale"]


def small_graph() -> GraphProto:
    nodes = [
        helper.make_node("Unsqueeze", ["matrix", "axis"], ["tiles"]),
        helper.make_node("Unsqueeze", ["x", "axis"], ["stays"]),
        helper.make_node("TernaryTileMatMul", ["x", "tiles", "scale", "tile"], ["y"], domain=DOMAIN),
        helper.make_node("SignatureRoute", ROUTE_INPUTS, ["tile_idx", "weight", "score"], domain=DOMAIN, top_k=2),
    ]
    constants = {"matrix": np.arange(6).reshape(2, 3), "axis": np.array([0]), "unread": np.zeros(2)}
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "g", [], [y], initializers)


def test_constants_get_their_axis_and_what_nothing_reads_goes() -> None:
    graph = small_graph()
    unsqueeze_constants(graph)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert constants.keys() == {"matrix", "axis", "tiles"}
    np.testing.assert_array_equal(constants["tiles"], [constants["matrix"]])
    assert [node.output[0] for node in graph.node] == ["stays", "y", "tile_idx"]


def test_activations_are_set_where_products_are_taken_and_not_where_tokens_are_routed() -> None:
    graph = small_graph()
    set_activations(graph, Activations(8, 128))
    set_activations(graph, Activations(8, 0))
    product, route = ({a.name: a.i for a in node.attribute} for node in graph.node[2:])
    assert product == {"activation_bits": 8, "group_size": 0}
    assert route == {"top_k": 2}


def test_scores_that_nothing_reads_lose_their_name() -> None:
    graph = small_graph()
    leave_out_unread(graph)
    assert list(graph.node[-1].output) == ["tile_idx", "weight", ""]
    for reader in (
        helper.make_node("Abs", ["score"], ["size"]),
        helper.make_tensor_value_info("score", TensorProto.FLOAT, None),
    ):
        graph = small_graph()
        (graph.output if isinstance(reader, ValueInfoProto) else graph.node).append(reader)
        leave_out_unread(graph)
        assert list(graph.node[3].output) == ["tile_idx", "weight", "score"]
