"""The operators of `ai.trix` written in standard ONNX operators, and their schemas for the exporter.

A model that carries `fallback_functions()` runs in any onnxruntime: with the native library registered its kernels
take precedence, without it the functions are inlined. They need opset 18 and ir_version 9 (onnxruntime 1.17).

Differences from the kernels: float sums have another order (results agree to rounding); nothing is validated: a
reserved code gives NaN, and a tile_idx outside [0, E) is not an error of ours; a NaN routing key counts as -inf.
x without columns (K = 0) needs a newer onnxruntime than 1.17.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ort_ops.panels import BLOCK_COLUMNS, PANEL_ROWS
from ort_ops.schema import (
    DOMAIN,
    OPS,
    OPSET_VERSION,
    SIGNATURE_ROUTE,
    SPARSE_LOOKUP,
    TERNARY_FFN,
    TERNARY_TILE_MATMUL,
    OpSchema,
)

ONNX_OPSET = 18

SMALLEST = 2.0**-100  # a group of activations below it counts as zeros
_VALUE_OF_CODE = (-1.0, 0.0, 1.0, float("nan"))


def fallback_functions() -> tuple[FunctionProto, ...]:
    """One model-local function per operator of the schema, to be appended to `model.functions`."""
    return _ternary_tile_matmul(), _signature_route(), _ternary_ffn(), _sparse_lookup()


def register_schemas() -> None:
    """Tell onnx about the operators, so that the exporter and the checker know them. May be called repeatedly."""
    for op in OPS:
        if not onnx.defs.has(op.name, DOMAIN):
            onnx.defs.register_schema(_onnx_schema(op))


def _onnx_schema(op: OpSchema) -> onnx.defs.OpSchema:
    types = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}
    parameter = onnx.defs.OpSchema.FormalParameter
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        OPSET_VERSION,
        doc=op.doc,
        inputs=[parameter(tensor.name, types[tensor.element_type]) for tensor in op.inputs],
        outputs=[parameter(tensor.name, types[tensor.element_type]) for tensor in op.outputs],
        attributes=[
            onnx.defs.OpSchema.Attribute(attribute.name, default_value=helper.make_attribute(attribute.name, attribute.default))
            for attribute in op.attributes
        ],
    )


def _ternary_tile_matmul() -> FunctionProto:
    """Loop over the tiles that occur: gather their tokens, multiply, scatter the rows of y.

    Only one tile is decoded at a time (N * K floats), and no tile's weights can be folded into a float constant, so
    memory stays packed. Work: T * N * K products, and one decoding per tile that occurs.
    """
    nodes = [
        *_decode_table(),
        *_pad_columns("packed"),
        *_quantise("x_padded", "x_used"),
        # y starts as [T, N] zeros; every row is then written by exactly one pass of the loop.
        _node("Shape", ["x"], ["num_tokens"], end=1),
        _node("Shape", ["row_scale"], ["num_rows"], start=1),
        _node("Concat", ["num_tokens", "num_rows"], ["y_shape"], axis=0),
        _node("ConstantOfShape", ["y_shape"], ["y_start"]),
        _node("Unique", ["tile_idx"], ["used_tiles"]),
        _node("Size", ["used_tiles"], ["num_used_tiles"]),
        _node("Loop", ["num_used_tiles", "", "y_start"], ["y"], body=_tile_loop_body()),
    ]
    return _function(TERNARY_TILE_MATMUL, nodes)


def _tile_loop_body() -> GraphProto:
    nodes = [
        _node("Gather", ["used_tiles", "loop_idx"], ["tile"]),
        _node("Equal", ["tile_idx", "tile"], ["is_of_tile"]),
        _node("NonZero", ["is_of_tile"], ["token_row"]),
        _node("Transpose", ["token_row"], ["token_column"], perm=[1, 0]),
        _node("GatherND", ["x_used", "token_column"], ["x_tile"]),
        _node("Gather", ["packed", "tile"], ["packed_tile"]),
        *_decode("packed_tile", "weight", "num_rows"),
        _node("Gemm", ["x_tile", "weight"], ["product"], transB=1),
        _node("Gather", ["row_scale", "tile"], ["tile_scale"]),
        _node("Mul", ["product", "tile_scale"], ["y_tile"]),
        _node("ScatterND", ["y_before", "token_column", "y_tile"], ["y_after"]),
        _node("Identity", ["continue_before"], ["continue_after"]),
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


def _signature_route() -> FunctionProto:
    """score = x @ signatures^T / sqrt(nnz); TopK of score + bias, whose ties go to the lowest index."""
    nodes = [
        *_decode_table(),
        *_pad_columns("signatures"),
        _node("Shape", ["bias"], ["num_rows"]),
        *_decode("signatures", "signature", "num_rows"),
        _node("Abs", ["signature"], ["is_active"]),
        _int_vector("columns_axis", [1]),
        _node("ReduceSum", ["is_active", "columns_axis"], ["nnz"], keepdims=0),
        _node("Constant", [], ["one"], value_float=1.0),
        _node("Max", ["nnz", "one"], ["nnz_at_least_one"]),
        _node("Sqrt", ["nnz_at_least_one"], ["norm"]),
        _node("Reciprocal", ["norm"], ["inverse_norm"]),
        _node("Gemm", ["x_padded", "signature"], ["dot"], transB=1),
        _node("Mul", ["dot", "inverse_norm"], ["score"]),
        _node("Add", ["score", "bias"], ["key"]),
        _node("IsNaN", ["key"], ["is_nan"]),
        _node("Constant", [], ["lowest"], value_float=float("-inf")),
        _node("Where", ["is_nan", "lowest", "key"], ["ranked_key"]),
        _attribute_value("top_k", "top_k_scalar"),
        _int_vector("one_dimension", [1]),
        _node("Reshape", ["top_k_scalar", "one_dimension"], ["num_chosen"]),
        # One row more for TopK: in onnxruntime 1.17 it divides by the number of rows, so no tokens would crash it.
        _int_vector("row_below", [0, 0, 1, 0]),
        _node("Pad", ["ranked_key", "row_below"], ["key_with_row_below"]),
        _node("TopK", ["key_with_row_below", "num_chosen"], ["chosen_key", "choice_with_row_below"], axis=1),
        _int_vector("first_row", [0]),
        _int_vector("last_row", [-1]),
        _node("Slice", ["choice_with_row_below", "first_row", "last_row", "first_row"], ["tile_idx"]),
    ]
    return _function(SIGNATURE_ROUTE, nodes)


def _ternary_ffn() -> FunctionProto:
    """Both products as TernaryTileMatMul, by its own function: for each of the T * K assignments one row."""
    nodes = [
        _node("Shape", ["tile_idx"], ["choice_shape"]),
        _int_vector("no_width", [1]),
        _node("Concat", ["choice_shape", "no_width"], ["column_shape"], axis=0),
        _node("Shape", ["x"], ["width"], start=1),
        _node("Concat", ["choice_shape", "width"], ["part_shape"], axis=0),
        _int_vector("choice_axis", [1]),
        _node("Unsqueeze", ["x", "choice_axis"], ["x_of_token"]),
        _node("Expand", ["x_of_token", "part_shape"], ["x_of_choice"]),
        _node("ReduceProd", ["choice_shape"], ["num_rows"], keepdims=1),
        _node("Concat", ["num_rows", "width"], ["rows_shape"], axis=0),
        _node("Reshape", ["x_of_choice", "rows_shape"], ["x_rows"], allowzero=1),
        _node("Reshape", ["tile_idx", "num_rows"], ["tile_of_row"], allowzero=1),
        _product(["x_rows", "up", "up_scale", "tile_of_row"], "up_value"),
        _node("Relu", ["up_value"], ["positive"]),
        _node("Mul", ["positive", "positive"], ["hidden"]),
        _product(["hidden", "down", "down_scale", "tile_of_row"], "part_rows"),
        _node("Reshape", ["part_rows", "part_shape"], ["part"], allowzero=1),
        _node("Reshape", ["weight", "column_shape"], ["weight_column"], allowzero=1),
        _node("Mul", ["part", "weight_column"], ["weighted"]),
        # A tile of weight 0 counts for nothing, whatever its values.
        _node("Constant", [], ["zero"], value_float=0.0),
        _node("Equal", ["weight_column", "zero"], ["is_unused"]),
        _node("Where", ["is_unused", "zero", "weighted"], ["used"]),
        _node("ReduceSum", ["used", "choice_axis"], ["y"], keepdims=0),
    ]
    return _function(TERNARY_FFN, nodes)


def _product(inputs: Sequence[str], output: str) -> NodeProto:
    """A TernaryTileMatMul with the attributes of the function that holds it."""
    node = helper.make_node(TERNARY_TILE_MATMUL.name, inputs, [output], domain=DOMAIN)
    for attribute in TERNARY_TILE_MATMUL.attributes:
        node.attribute.append(AttributeProto(name=attribute.name, type=AttributeProto.INT, ref_attr_name=attribute.name))
    return node


def _sparse_lookup() -> FunctionProto:
    """Points, gates [T, K] and magnitudes [T, K], then the directions that they weigh."""
    grid = helper.make_graph(_grid_magnitude(), "grid", [], [_float_info("grid_magnitude")])
    hinges = helper.make_graph(_hinge_magnitude(), "hinges", [], [_float_info("hinge_magnitude")])
    nodes = [
        _node("Constant", [], ["half"], value_float=0.5),
        _node("Constant", [], ["one"], value_float=1.0),
        _node("Constant", [], ["one_step"], value_int=1),
        _node("Constant", [], ["no_step"], value_int=0),
        _node("Gemm", ["h", "compress", "compress_bias"], ["before"]),
        _node("Constant", [], ["sqrt_half"], value_float=0.5**0.5),
        _node("Mul", ["before", "sqrt_half"], ["scaled"]),
        _node("Erf", ["scaled"], ["erf"]),
        _node("Add", ["erf", "one"], ["twice_share"]),
        _node("Mul", ["before", "twice_share"], ["twice_hidden"]),
        _node("Mul", ["twice_hidden", "half"], ["hidden"]),
        _node("Gemm", ["hidden", "point_weight", "point_bias"], ["before_tanh"], transB=1),
        _node("Tanh", ["before_tanh"], ["point"]),
        _node("GatherElements", ["score", "tile_idx"], ["chosen_score"], axis=1),
        _node("Sigmoid", ["chosen_score"], ["share"]),
        _node("Size", ["gate_curve"], ["num_knots"]),
        _node("Sub", ["num_knots", "one_step"], ["num_segments"]),
        *_steps("share", "num_segments", "segment", "part"),
        _node("Add", ["segment", "one_step"], ["next_knot"]),
        _node("Gather", ["gate_curve", "segment"], ["gate_start"]),
        _node("Gather", ["gate_curve", "next_knot"], ["gate_end"]),
        _node("Sub", ["gate_end", "gate_start"], ["gate_rise"]),
        _node("Mul", ["gate_rise", "part"], ["gate_step"]),
        _node("Add", ["gate_start", "gate_step"], ["gate"]),
        _int_vector("first_axis", [0]),
        _int_vector("second_axis", [1]),
        _int_vector("last_axis", [2]),
        _attribute_value("grid_size", "grid"),
        _attribute_value("has_hinges", "hinges_flag"),
        _node("Equal", ["hinges_flag", "one_step"], ["is_hinged"]),
        _node("If", ["is_hinged"], ["magnitude"], then_branch=hinges, else_branch=grid),
        _node("Mul", ["gate", "magnitude"], ["size"]),
        _node("Unsqueeze", ["size", "last_axis"], ["size_column"]),
        _node("Gather", ["direction", "tile_idx"], ["chosen_direction"]),
        _node("Mul", ["size_column", "chosen_direction"], ["summand"]),
        _node("ReduceSum", ["summand", "second_axis"], ["update"], keepdims=0),
        _node("Add", ["x", "update"], ["y"]),
    ]
    return _function(SPARSE_LOOKUP, nodes)


def _steps(share: str, num_steps: str, whole: str, part: str) -> list[NodeProto]:
    """Where a share in [0, 1] lies on num_steps equal steps: which step, int64, and how far in it."""
    position, below, last = f"{whole}_position", f"{whole}_below", f"{whole}_last"
    return [
        _node("Cast", [num_steps], [f"{whole}_count"], to=TensorProto.FLOAT),
        _node("Mul", [share, f"{whole}_count"], [position]),
        _node("Cast", [position], [below], to=TensorProto.INT64),
        _node("Sub", [num_steps, "one_step"], [last]),
        _node("Min", [below, last], [f"{whole}_at_most"]),
        _node("Max", [f"{whole}_at_most", "no_step"], [whole]),
        _node("Cast", [whole], [f"{whole}_float"], to=TensorProto.FLOAT),
        _node("Sub", [position, f"{whole}_float"], [part]),
    ]


def _grid_magnitude() -> list[NodeProto]:
    nodes = [
        _node("Add", ["point", "one"], ["from_corner"]),
        _node("Mul", ["from_corner", "half"], ["place"]),
        *_steps("place", "grid", "cell", "high"),
        _node("Sub", ["one", "high"], ["low"]),
        _node("Add", ["grid", "one_step"], ["corners"]),
        _node("Mul", ["corners", "corners"], ["num_values"]),
        _node("Mul", ["tile_idx", "num_values"], ["first_of_tile"]),
        _node("Gather", ["cell", "first_axis"], ["cell_row"], axis=1),
        _node("Gather", ["cell", "second_axis"], ["cell_column"], axis=1),
        _node("Mul", ["cell_row", "corners"], ["first_of_row"]),
        _node("Add", ["first_of_row", "cell_column"], ["cell_place"]),
        _node("Add", ["first_of_tile", "cell_place"], ["low_low_place"]),
        _node("Add", ["low_low_place", "one_step"], ["low_high_place"]),
        _node("Add", ["low_low_place", "corners"], ["high_low_place"]),
        _node("Add", ["low_high_place", "corners"], ["high_high_place"]),
        _int_vector("flat", [-1]),
        _node("Reshape", ["splines", "flat"], ["corner_values"]),
    ]
    for side in ("low", "high"):
        nodes.append(_node("Gather", [side, "first_axis"], [f"{side}_row"], axis=1))
        nodes.append(_node("Gather", [side, "second_axis"], [f"{side}_column"], axis=1))
    terms = []
    for corner in ("low_low", "low_high", "high_low", "high_high"):
        row, column = corner.split("_")
        nodes += [
            _node("Gather", ["corner_values", f"{corner}_place"], [f"{corner}_value"]),
            _node("Mul", [f"{row}_row", f"{column}_column"], [f"{corner}_weight"]),
            _node("Mul", [f"{corner}_weight", f"{corner}_value"], [f"{corner}_term"]),
        ]
        terms.append(f"{corner}_term")
    return [*nodes, _node("Sum", terms, ["grid_magnitude"])]


def _hinge_magnitude() -> list[NodeProto]:
    """Of the rows [T, K, 4 G + 1], five parts; points as columns [T, 1, 1].

    Cut out one by one: shape inference would refuse a Split of rows that belong to the other branch.
    """
    cut = []
    for place, part in enumerate(("slope", "other_slope", "offset", "height")):
        cut += [
            _int_vector(f"{part}_place", [place]),
            _node("Mul", ["num_hinges", f"{part}_place"], [f"{part}_start"]),
            _node("Add", [f"{part}_start", "num_hinges"], [f"{part}_end"]),
            _node("Slice", ["spline", f"{part}_start", f"{part}_end", "last_axis"], [part]),
        ]
    return [
        _node("Gather", ["splines", "tile_idx"], ["spline"]),
        _node("Reshape", ["grid", "second_axis"], ["num_hinges"]),
        *cut,
        _int_vector("last_column", [-1]),
        _node("Gather", ["spline", "last_column"], ["base"], axis=2),
        _node("Unsqueeze", ["point", "last_axis"], ["coordinates"]),
        _node("Gather", ["coordinates", "first_axis"], ["coordinate"], axis=1),
        _node("Gather", ["coordinates", "second_axis"], ["other_coordinate"], axis=1),
        _node("Mul", ["slope", "coordinate"], ["along"]),
        _node("Mul", ["other_slope", "other_coordinate"], ["along_other"]),
        _node("Add", ["offset", "along"], ["crease_along"]),
        _node("Add", ["crease_along", "along_other"], ["crease"]),
        _node("Relu", ["crease"], ["bent"]),
        _node("Mul", ["bent", "height"], ["hinge"]),
        _node("ReduceSum", ["hinge", "last_axis"], ["hinges"], keepdims=0),
        _node("Squeeze", ["base", "last_axis"], ["base_value"]),
        _node("Add", ["hinges", "base_value"], ["hinge_magnitude"]),
    ]


def _decode_table() -> list[NodeProto]:
    """`decode_table` [256, 4]: the four values in each byte."""
    codes = np.arange(256)[:, None] >> (2 * np.arange(4)) & 3
    table = np.array(_VALUE_OF_CODE, dtype=np.float32)[codes]
    return [_node("Constant", [], ["decode_table"], value=numpy_helper.from_array(table, "decode_table"))]


def _decode(packed: str, weight: str, num_rows: str) -> list[NodeProto]:
    """Panels [P, B, 128] to their first N rows, float [N, 16 B]. Gather takes int32 or int64, so uint8 is cast."""
    panels, rows, padded = f"{packed}_panels", f"{packed}_rows", f"{packed}_padded"
    return [
        _node("Cast", [packed], [f"{packed}_bytes"], to=TensorProto.INT32),
        _node("Gather", ["decode_table", f"{packed}_bytes"], [f"{packed}_values"]),
        # [P, B, 128 = (32 rows, 4 j), 4 fields] -> [P, rows, B, fields, j]
        _int_vector(f"{packed}_split", [0, 0, PANEL_ROWS, 4, 4]),
        _node("Reshape", [f"{packed}_values", f"{packed}_split"], [panels]),
        _node("Transpose", [panels], [rows], perm=[0, 2, 1, 4, 3]),
        _node("Reshape", [rows, "decoded_shape"], [padded], allowzero=1),
        _int_vector(f"{packed}_first", [0]),
        _node("Slice", [padded, f"{packed}_first", num_rows, f"{packed}_first"], [weight]),
    ]


def _pad_columns(packed: str) -> list[NodeProto]:
    """`x_padded`: x with zero columns up to the 16 B of the panels; `decoded_shape`: [32 P, 16 B]."""
    return [
        _node("Shape", ["x"], ["num_columns"], start=1),
        _node("Shape", [packed], ["num_panels_and_blocks"], start=-3, end=-1),
        _int_vector("panel_size", [PANEL_ROWS, BLOCK_COLUMNS]),
        _node("Mul", ["num_panels_and_blocks", "panel_size"], ["decoded_shape"]),
        _int_vector("columns_at", [1]),
        _node("Gather", ["decoded_shape", "columns_at"], ["num_padded"]),
        _node("Sub", ["num_padded", "num_columns"], ["num_padding"]),
        _int_vector("no_padding", [0, 0, 0]),
        _node("Concat", ["no_padding", "num_padding"], ["paddings"], axis=0),
        _node("Pad", ["x", "paddings"], ["x_padded"]),
    ]


def _quantise(x: str, output: str) -> list[NodeProto]:
    """x [T, K] as the int8 kernels see it, q * scale; x itself where activation_bits is 24."""
    as_it_is = helper.make_graph([_node("Identity", [x], ["as_it_is"])], "as_it_is_graph", [], [_float_info("as_it_is")])
    quantised = helper.make_graph(_quantised(x), "quantised_graph", [], [_float_info("quantised")])
    return [
        _attribute_value("activation_bits", "activation_bits"),
        _node("Constant", [], ["int8_bits"], value_int=8),
        _node("Equal", ["activation_bits", "int8_bits"], ["is_int8"]),
        _node("If", ["is_int8"], [output], then_branch=quantised, else_branch=as_it_is),
    ]


def _quantised(x: str) -> list[NodeProto]:
    """Groups [T, G, C]: C = group_size, or all columns (at least 1) where it is 0."""
    return [
        _attribute_value("group_size", "group_size"),
        _node("Shape", [x], ["quantised_shape"]),
        _int_vector("column_axis", [1]),
        _node("Gather", ["quantised_shape", "column_axis"], ["num_quantised"]),
        _int_vector("one_column", [1]),
        _node("Max", ["num_quantised", "one_column"], ["whole_row"]),
        _int_vector("scalar_shape", [1]),
        _node("Reshape", ["group_size", "scalar_shape"], ["given_group"]),
        _int_vector("zero_group", [0]),
        _node("Equal", ["given_group", "zero_group"], ["is_one_group"]),
        _node("Where", ["is_one_group", "whole_row", "given_group"], ["group_columns"]),
        # Columns up to a whole number of groups: (-K) mod C.
        _node("Neg", ["num_quantised"], ["minus_columns"]),
        _node("Mod", ["minus_columns", "group_columns"], ["group_padding"]),
        _int_vector("no_group_padding", [0, 0, 0]),
        _node("Concat", ["no_group_padding", "group_padding"], ["group_paddings"], axis=0),
        _node("Pad", [x, "group_paddings"], ["x_of_groups"]),
        _node("Add", ["num_quantised", "group_padding"], ["num_of_groups"]),
        _node("Div", ["num_of_groups", "group_columns"], ["num_groups"]),
        _int_vector("all_tokens", [0]),
        _node("Concat", ["all_tokens", "num_groups", "group_columns"], ["group_shape"], axis=0),
        _node("Reshape", ["x_of_groups", "group_shape"], ["group"]),
        _node("Abs", ["group"], ["magnitude"]),
        _int_vector("last_axis", [-1]),
        _node("ReduceMax", ["magnitude", "last_axis"], ["largest"], keepdims=1),
        _node("Constant", [], ["levels"], value_float=127.0),
        _node("Div", ["levels", "largest"], ["inverse"]),
        _node("Constant", [], ["smallest"], value_float=SMALLEST),
        _node("Less", ["largest", "smallest"], ["is_tiny"]),
        _node("Constant", [], ["no_scale"], value_float=0.0),
        _node("Where", ["is_tiny", "no_scale", "inverse"], ["factor"]),
        _node("Mul", ["group", "factor"], ["scaled"]),
        _node("Round", ["scaled"], ["q"]),
        _node("Div", ["largest", "levels"], ["scale"]),
        _node("Mul", ["q", "scale"], ["dequantised"]),
        _node("Shape", ["x_of_groups"], ["dequantised_shape"]),
        _node("Reshape", ["dequantised", "dequantised_shape"], ["dequantised_row"], allowzero=1),
        _node("Slice", ["dequantised_row", "all_tokens", "num_quantised", "column_axis"], ["quantised"]),
    ]


def _float_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None])


def _int_vector(output: str, values: Sequence[int]) -> NodeProto:
    """A constant int64 vector. As a tensor: the shape inference of onnxruntime 1.17 misreads `value_ints`."""
    return _node("Constant", [], [output], value=numpy_helper.from_array(np.array(values, dtype=np.int64), output))


def _attribute_value(attribute: str, output: str) -> NodeProto:
    """A constant that takes its value from an integer attribute of the function."""
    node = _node("Constant", [], [output])
    node.attribute.append(
        AttributeProto(name="value_int", type=AttributeProto.INT, ref_attr_name=attribute),
    )
    return node


def _node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, **attributes)


def _function(op: OpSchema, nodes: Sequence[NodeProto]) -> FunctionProto:
    return helper.make_function(
        DOMAIN,
        op.name,
        [tensor.name for tensor in op.inputs],
        [tensor.name for tensor in op.outputs],
        nodes,
        [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        attributes=[],
        attribute_protos=[helper.make_attribute(attribute.name, attribute.default) for attribute in op.attributes],
        doc_string=op.doc,
    )
