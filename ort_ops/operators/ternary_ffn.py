"""The operator TernaryFFN: a feed-forward layer of ternary tiles, each token through the tiles chosen for it.

Legend: T tokens, D model width (K in the check), C or top_k chosen tiles per token, E tiles, H hidden values (N in the check).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, helper

from ort_ops.graph_nodes import as_function, attribute_reference, int_vector, node
from ort_ops.operators.checks import NUM_COLUMNS, NUM_ROWS, NUM_TILES, NUM_TOKENS, TOP_K, Array, Run, relative_error
from ort_ops.operators.operator import Operator, Translation
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION, FloatAttribute, OpSchema, TensorSchema

_SHAPES = (NUM_TILES, NUM_ROWS, NUM_COLUMNS), (NUM_TILES, NUM_COLUMNS, NUM_ROWS)  # of up and down, in the check

TERNARY_FFN = OpSchema(
    name="TernaryFFN",
    inputs=(
        TensorSchema("x", "float32", ("T", "D")),
        TensorSchema("tile_idx", "int64", ("T", "top_k")),
        TensorSchema("weight", "float32", ("T", "top_k")),
        TensorSchema("up", "uint8", ("E", "ceil(H/32)", "ceil(D/16)", "128")),
        TensorSchema("up_scale", "float32", ("E", "H")),
        TensorSchema("down", "uint8", ("E", "ceil(D/32)", "ceil(H/16)", "128")),
        TensorSchema("down_scale", "float32", ("E", "D")),
    ),
    outputs=(TensorSchema("y", "float32", ("T", "D")),),
    attributes=TERNARY_TILE_MATMUL.attributes,
    doc=(
        "y[t] = sum_k weight[t, k] * down_e relu(up_e x[t])^2 with e = tile_idx[t, k], 0 <= e < E, and products as those of "
        "TernaryTileMatMul. Tiles of weight 0 are not computed."
    ),
)


def _function() -> FunctionProto:
    """Both products as TernaryTileMatMul, by its own function: for each of the T * K assignments one row."""
    nodes = [
        node("Shape", ["tile_idx"], ["choice_shape"]),
        int_vector("no_width", [1]),
        node("Concat", ["choice_shape", "no_width"], ["column_shape"], axis=0),
        node("Shape", ["x"], ["width"], start=1),
        node("Concat", ["choice_shape", "width"], ["part_shape"], axis=0),
        int_vector("choice_axis", [1]),
        node("Unsqueeze", ["x", "choice_axis"], ["x_of_token"]),
        node("Expand", ["x_of_token", "part_shape"], ["x_of_choice"]),
        node("ReduceProd", ["choice_shape"], ["num_rows"], keepdims=1),
        node("Concat", ["num_rows", "width"], ["rows_shape"], axis=0),
        node("Reshape", ["x_of_choice", "rows_shape"], ["x_rows"], allowzero=1),
        node("Reshape", ["tile_idx", "num_rows"], ["tile_of_row"], allowzero=1),
        _product(["x_rows", "up", "up_scale", "tile_of_row"], "up_value"),
        node("Relu", ["up_value"], ["positive"]),
        node("Mul", ["positive", "positive"], ["hidden"]),
        _product(["hidden", "down", "down_scale", "tile_of_row"], "part_rows"),
        node("Reshape", ["part_rows", "part_shape"], ["part"], allowzero=1),
        node("Reshape", ["weight", "column_shape"], ["weight_column"], allowzero=1),
        node("Mul", ["part", "weight_column"], ["weighted"]),
        # A tile of weight 0 counts for nothing, whatever its values.
        node("Constant", [], ["zero"], value_float=0.0),
        node("Equal", ["weight_column", "zero"], ["is_unused"]),
        node("Where", ["is_unused", "zero", "weighted"], ["used"]),
        node("ReduceSum", ["used", "choice_axis"], ["y"], keepdims=0),
    ]
    return as_function(TERNARY_FFN, nodes)


def _product(inputs: Sequence[str], output: str) -> NodeProto:
    """A TernaryTileMatMul with the attributes of the function that holds it."""
    node = helper.make_node(TERNARY_TILE_MATMUL.name, inputs, [output], domain=DOMAIN)
    for attribute in TERNARY_TILE_MATMUL.attributes:
        kind = AttributeProto.FLOAT if isinstance(attribute, FloatAttribute) else AttributeProto.INT
        node.attribute.append(attribute_reference(attribute.name, kind))
    return node


def _check(run: Run) -> float:
    rng = np.random.default_rng(2)
    up_ENK, down_EKN = (rng.integers(-1, 2, shape) for shape in _SHAPES)
    x_TK = rng.standard_normal((NUM_TOKENS, NUM_COLUMNS), dtype=np.float32)
    up_scale_EN, down_scale_EK = (rng.uniform(0.1, 2.0, m.shape[:2]).astype(np.float32) for m in (up_ENK, down_EKN))
    weight_TC = rng.uniform(0.5, 2.0, (NUM_TOKENS, TOP_K)).astype(np.float32)
    tile_idx_TC = rng.integers(0, NUM_TILES, (NUM_TOKENS, TOP_K))
    feeds: dict[str, Array] = {"x": x_TK, "tile_idx": tile_idx_TC, "weight": weight_TC}
    feeds |= {"up": to_panels(up_ENK), "up_scale": up_scale_EN, "down": to_panels(down_EKN), "down_scale": down_scale_EK}
    (y_TK,) = run(TERNARY_FFN, feeds)
    before_TCN = np.einsum("tk,tcnk->tcn", x_TK.astype(np.float64), up_ENK[tile_idx_TC]) * up_scale_EN[tile_idx_TC]
    part_TCK = np.einsum("tcn,tckn->tck", np.maximum(before_TCN, 0.0) ** 2, down_EKN[tile_idx_TC]) * down_scale_EK[tile_idx_TC]
    return relative_error(y_TK, np.einsum("tck,tc->tk", part_TCK, weight_TC))


def _translations() -> dict[Any, Translation]:
    import torch
    from onnxscript.values import Opset

    opset = Opset(DOMAIN, OPSET_VERSION)

    def translate(*inputs: Any) -> Any:
        return opset.TernaryFFN(*inputs)

    return {torch.ops.trix.ternary_ffn.default: translate}


OPERATOR = Operator(TERNARY_FFN, _function, _check, _translations)
