import numpy as np
import onnxruntime as ort
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from ort_ops.graph import (
    Activations,
    divide_by_roots,
    join_reshapes,
    leave_out_unread,
    missing_functions,
    set_activations,
    share_constants,
    unsqueeze_constants,
)
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


def standard_graph(nodes: list[NodeProto], constants: dict[str, np.ndarray]) -> GraphProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("x", "y")]
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return helper.make_graph(nodes, "g", values[:1], values[1:], initializers)


def answer(graph: GraphProto, x: np.ndarray) -> np.ndarray:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_a_product_with_an_inverse_root_becomes_a_quotient() -> None:
    nodes = [
        helper.make_node("Sqrt", ["x"], ["root"]),
        helper.make_node("Reciprocal", ["root"], ["inverse"]),
        helper.make_node("Mul", ["inverse", "x"], ["z"]),
        helper.make_node("Reciprocal", ["z"], ["of_no_root"]),
        helper.make_node("Mul", ["z", "of_no_root"], ["one"]),
        helper.make_node("Reciprocal", ["root"], ["twice_read"]),
        helper.make_node("Mul", ["twice_read", "twice_read"], ["square"]),
        helper.make_node("Sum", ["z", "one", "square"], ["y"]),
    ]
    graph = standard_graph(nodes, {})
    x = np.array([0.25, 4.0, 9.0], dtype=np.float32)
    before = answer(graph, x)
    divide_by_roots(graph)
    assert [node.op_type for node in graph.node] == ["Sqrt", "Div", "Reciprocal", "Mul", "Reciprocal", "Mul", "Sum"]
    np.testing.assert_allclose(answer(graph, x), before, rtol=1e-6)


def test_of_reshapes_in_a_row_the_last_one_stays_unless_one_between_is_read() -> None:
    shapes = {"a": np.array([2, 3]), "b": np.array([3, 2]), "c": np.array([6]), "keeps": np.array([0, 3])}
    nodes = [
        helper.make_node("Reshape", ["x", "a"], ["x_a"], allowzero=1),
        helper.make_node("Reshape", ["x_a", "b"], ["x_b"], allowzero=1),
        helper.make_node("Reshape", ["x_b", "c"], ["x_c"], allowzero=1),
        helper.make_node("Reshape", ["x_a", "keeps"], ["x_keeps"]),  # its 0 is the size of x_a
        helper.make_node("Reshape", ["x_keeps", "c"], ["x_end"], allowzero=1),
        helper.make_node("Sum", ["x_c", "x_end"], ["y"]),
    ]
    graph = standard_graph(nodes, shapes)
    x = np.arange(6, dtype=np.float32)
    before = answer(graph, x)
    join_reshapes(graph)
    assert [(node.input[0], node.output[0]) for node in graph.node] == [("x", "x_c"), ("x", "x_end"), ("x_c", "y")]
    np.testing.assert_array_equal(answer(graph, x), before)

    read_between = standard_graph([*nodes[:3], helper.make_node("Flatten", ["x_b"], ["y"])], shapes)
    join_reshapes(read_between)
    assert [node.output[0] for node in read_between.node] == ["x_b", "y"]


def test_equal_constants_are_shared_but_for_those_of_our_operators() -> None:
    same = np.arange(3, dtype=np.float32)
    constants = {"first": same, "second": same, "whole": same.astype(np.int64), "column": same[:, None], "ours": same}
    nodes = [
        helper.make_node("Sum", ["x", "first", "second", "column"], ["y"]),
        helper.make_node("Gather", ["first", "whole"], ["z"]),
        helper.make_node("SignatureRoute", ["x", "packed", "ours"], ["tile_idx"], domain=DOMAIN),
    ]
    graph = standard_graph(nodes, constants)
    share_constants(graph)
    assert [list(node.input) for node in graph.node] == [
        ["x", "first", "first", "column"],
        ["first", "whole"],
        ["x", "packed", "ours"],
    ]
    assert [tensor.name for tensor in graph.initializer] == ["first", "whole", "column", "ours"]
    graph.output.append(helper.make_tensor_value_info("column", TensorProto.FLOAT, None))
    graph.initializer.append(numpy_helper.from_array(same[:, None], "column_too"))
    share_constants(graph)
    assert "column" in {tensor.name for tensor in graph.initializer}


def test_only_the_definitions_that_a_model_reaches_are_missing() -> None:
    graph = small_graph()
    model = helper.make_model(graph)
    assert [function.name for function in missing_functions(model)] == ["TernaryTileMatMul", "SignatureRoute"]
    inner = helper.make_graph([helper.make_node("TernaryFFN", list("abcdefg"), ["y"], domain=DOMAIN)], "inner", [], [])
    del graph.node[:]
    graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    model = helper.make_model(graph)
    assert [function.name for function in missing_functions(model)] == ["TernaryTileMatMul", "TernaryFFN"]
