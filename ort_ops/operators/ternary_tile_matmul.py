"""The operator TernaryTileMatMul: each token times the packed ternary matrix of its tile.

Legend: T tokens, K columns of x, E tiles, N rows of a tile, G groups of columns, C columns of a group.
"""

from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper

from ort_ops.graph_nodes import as_function, attribute_value, float_info, int_vector, node
from ort_ops.operators.checks import NUM_COLUMNS, NUM_ROWS, NUM_TILES, NUM_TOKENS, Array, Run, relative_error
from ort_ops.operators.operator import Operator, Translation
from ort_ops.operators.packed_nodes import decode, decode_table, pad_columns
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION, FloatAttribute, IntAttribute, OpSchema, TensorSchema

SMALLEST = 2.0**-100  # a group of activations below it counts as zeros

TERNARY_TILE_MATMUL = OpSchema(
    name="TernaryTileMatMul",
    inputs=(
        TensorSchema("x", "float32", ("T", "K")),
        TensorSchema("packed", "uint8", ("E", "ceil(N/32)", "ceil(K/16)", "128")),
        TensorSchema("row_scale", "float32", ("E", "N")),
        TensorSchema("tile_idx", "int64", ("T",)),
    ),
    outputs=(TensorSchema("y", "float32", ("T", "N")),),
    attributes=(IntAttribute("activation_bits", 24), IntAttribute("group_size", 128), FloatAttribute("min_magnitude", 0.0)),
    doc=(
        "y[t, n] = row_scale[e, n] * sum_k x[t, k] * w[e, n, k] with e = tile_idx[t], 0 <= e < E. x is quantised in G groups "
        "of group_size columns (128, or 0: all) with m = max |x| of the group, which counts as zeros below 2^-100. "
        "activation_bits 24: to within m * 2^-23, and sums are float32. The error is at most |row_scale| * 2^-23 * (sum_k m "
        "|w| + (3 G + 2) sum_k |x w|). Where more than 1/4 of a group's nonzero |x| are below m / 2^12, the remainder after 24 "
        "bits is quantised and multiplied too. Such tokens are as exact as in float32, without the term sum_k m |w|. 8: to "
        "round(x * (127 / m)) * m / 127, m at least min_magnitude, which must be 0 with 24 bits; where it is not 0, 127 / m is "
        "127 * (1 / m), rounded twice, as in torch's BitLinear."
    ),
)


def _function() -> FunctionProto:
    """Loop over the tiles that occur: gather their tokens, multiply, scatter the rows of y.

    Only one tile is decoded at a time (N * K floats), and no tile's weights can be folded into a float constant, so
    memory stays packed. Work: T * N * K products, and one decoding per tile that occurs.
    """
    nodes = [
        *decode_table(),
        *pad_columns("packed"),
        *quantise("x_padded", "x_used"),
        # y starts as [T, N] zeros; every row is then written by exactly one pass of the loop.
        node("Shape", ["x"], ["num_tokens"], end=1),
        node("Shape", ["row_scale"], ["num_rows"], start=1),
        node("Concat", ["num_tokens", "num_rows"], ["y_shape"], axis=0),
        node("ConstantOfShape", ["y_shape"], ["y_start"]),
        node("Unique", ["tile_idx"], ["used_tiles"]),
        node("Size", ["used_tiles"], ["num_used_tiles"]),
        node("Loop", ["num_used_tiles", "", "y_start"], ["y"], body=_tile_loop_body()),
    ]
    return as_function(TERNARY_TILE_MATMUL, nodes)


def _tile_loop_body() -> GraphProto:
    nodes = [
        node("Gather", ["used_tiles", "loop_idx"], ["tile"]),
        node("Equal", ["tile_idx", "tile"], ["is_of_tile"]),
        node("NonZero", ["is_of_tile"], ["token_row"]),
        node("Transpose", ["token_row"], ["token_column"], perm=[1, 0]),
        node("GatherND", ["x_used", "token_column"], ["x_tile"]),
        node("Gather", ["packed", "tile"], ["packed_tile"]),
        *decode("packed_tile", "weight", "num_rows"),
        node("Gemm", ["x_tile", "weight"], ["product"], transB=1),
        node("Gather", ["row_scale", "tile"], ["tile_scale"]),
        node("Mul", ["product", "tile_scale"], ["y_tile"]),
        node("ScatterND", ["y_before", "token_column", "y_tile"], ["y_after"]),
        node("Identity", ["continue_before"], ["continue_after"]),
    ]
    inputs = [
        helper.make_tensor_value_info("loop_idx", TensorProto.INT64, []),
        helper.make_tensor_value_info("continue_before", TensorProto.BOOL, []),
        helper.make_tensor_value_info("y_before", TensorProto.FLOAT, [None, None]),
    ]
    outputs = [
        helper.make_tensor_value_info("continue_after", TensorProto.BOOL, []),
        helper.make_tensor_value_info("y_after", TensorProto.FLOAT, [None, None]),
    ]
    return helper.make_graph(nodes, "multiply_tile", inputs, outputs)


def quantise(x: str, output: str) -> list[NodeProto]:
    """x [T, K] as the int8 kernels see it, q * scale; x itself where activation_bits is 24."""
    as_it_is = helper.make_graph([node("Identity", [x], ["as_it_is"])], "as_it_is_graph", [], [float_info("as_it_is")])
    quantised = helper.make_graph(_quantised(x), "quantised_graph", [], [float_info("quantised")])
    return [
        attribute_value("activation_bits", "activation_bits"),
        node("Constant", [], ["int8_bits"], value_int=8),
        node("Equal", ["activation_bits", "int8_bits"], ["is_int8"]),
        node("If", ["is_int8"], [output], then_branch=quantised, else_branch=as_it_is),
    ]


def _quantised(x: str) -> list[NodeProto]:
    """Groups [T, G, C]: C = group_size, or all columns (at least 1) where it is 0."""
    return [
        attribute_value("group_size", "group_size"),
        node("Shape", [x], ["quantised_shape"]),
        int_vector("column_axis", [1]),
        node("Gather", ["quantised_shape", "column_axis"], ["num_quantised"]),
        int_vector("one_column", [1]),
        node("Max", ["num_quantised", "one_column"], ["whole_row"]),
        int_vector("scalar_shape", [1]),
        node("Reshape", ["group_size", "scalar_shape"], ["given_group"]),
        int_vector("zero_group", [0]),
        node("Equal", ["given_group", "zero_group"], ["is_one_group"]),
        node("Where", ["is_one_group", "whole_row", "given_group"], ["group_columns"]),
        # Columns up to a whole number of groups: (-K) mod C.
        node("Neg", ["num_quantised"], ["minus_columns"]),
        node("Mod", ["minus_columns", "group_columns"], ["group_padding"]),
        int_vector("no_group_padding", [0, 0, 0]),
        node("Concat", ["no_group_padding", "group_padding"], ["group_paddings"], axis=0),
        node("Pad", [x, "group_paddings"], ["x_of_groups"]),
        node("Add", ["num_quantised", "group_padding"], ["num_of_groups"]),
        node("Div", ["num_of_groups", "group_columns"], ["num_groups"]),
        int_vector("all_tokens", [0]),
        node("Concat", ["all_tokens", "num_groups", "group_columns"], ["group_shape"], axis=0),
        node("Reshape", ["x_of_groups", "group_shape"], ["group"]),
        node("Abs", ["group"], ["magnitude"]),
        int_vector("last_axis", [-1]),
        node("ReduceMax", ["magnitude", "last_axis"], ["largest_found"], keepdims=1),
        attribute_value("min_magnitude", "min_magnitude", AttributeProto.FLOAT),
        node("Max", ["largest_found", "min_magnitude"], ["largest"]),
        node("Constant", [], ["levels"], value_float=127.0),
        # With a min_magnitude rounded twice, as torch divides a number by a tensor: so does BitLinear.
        node("Reciprocal", ["largest"], ["reciprocal"]),
        node("Mul", ["levels", "reciprocal"], ["rounded_twice"]),
        node("Div", ["levels", "largest"], ["rounded_once"]),
        node("Constant", [], ["no_scale"], value_float=0.0),
        node("Greater", ["min_magnitude", "no_scale"], ["has_least"]),
        node("Where", ["has_least", "rounded_twice", "rounded_once"], ["inverse"]),
        node("Constant", [], ["smallest"], value_float=SMALLEST),
        node("Less", ["largest_found", "smallest"], ["is_tiny"]),
        node("Where", ["is_tiny", "no_scale", "inverse"], ["factor"]),
        node("Mul", ["group", "factor"], ["scaled"]),
        node("Round", ["scaled"], ["q"]),
        node("Div", ["largest", "levels"], ["scale"]),
        node("Mul", ["q", "scale"], ["dequantised"]),
        node("Shape", ["x_of_groups"], ["dequantised_shape"]),
        node("Reshape", ["dequantised", "dequantised_shape"], ["dequantised_row"], allowzero=1),
        node("Slice", ["dequantised_row", "all_tokens", "num_quantised", "column_axis"], ["quantised"]),
    ]


def _check(run: Run) -> float:
    rng = np.random.default_rng(0)
    weight_ENK = rng.integers(-1, 2, (NUM_TILES, NUM_ROWS, NUM_COLUMNS))
    x_TK = rng.standard_normal((NUM_TOKENS, NUM_COLUMNS), dtype=np.float32)
    row_scale_EN = rng.uniform(0.1, 2.0, (NUM_TILES, NUM_ROWS)).astype(np.float32)
    tile_idx_T = rng.integers(0, NUM_TILES, NUM_TOKENS)
    feeds: dict[str, Array] = {"x": x_TK, "packed": to_panels(weight_ENK), "row_scale": row_scale_EN, "tile_idx": tile_idx_T}
    (y_TN,) = run(TERNARY_TILE_MATMUL, feeds)
    expected_TN = np.einsum("tk,tnk->tn", x_TK.astype(np.float64), weight_ENK[tile_idx_T]) * row_scale_EN[tile_idx_T]
    return relative_error(y_TN, expected_TN)


def _translations() -> dict[Any, Translation]:
    import torch
    from onnxscript.values import Opset

    opset = Opset(DOMAIN, OPSET_VERSION)

    def translate(x: Any, packed: Any, row_scale: Any, tile_idx: Any) -> Any:
        return opset.TernaryTileMatMul(x, packed, row_scale, tile_idx)

    def translate_8bit(x: Any, packed: Any, row_scale: Any, tile_idx: Any, min_magnitude: float) -> Any:
        attributes = {"activation_bits": 8, "group_size": 0, "min_magnitude": min_magnitude}
        return opset.TernaryTileMatMul(x, packed, row_scale, tile_idx, **attributes)

    return {
        torch.ops.trix.ternary_tile_matmul.default: translate,
        torch.ops.trix.ternary_tile_matmul_8bit.default: translate_8bit,
    }


OPERATOR = Operator(TERNARY_TILE_MATMUL, _function, _check, _translations)
