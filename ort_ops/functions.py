"""The operators of `ai.trix` written in standard ONNX operators, and their schemas for the exporter.

A model that carries `fallback_functions()` runs in any onnxruntime: with the native library registered its kernels
take precedence, without it the functions are inlined. They need opset 18 and ir_version 9 (onnxruntime 1.17).

Differences from the kernels: float sums have another order (results agree to rounding); nothing is validated: a
reserved code gives NaN, and a tile_idx outside [0, E) is not an error of ours; a NaN routing key counts as -inf.
x without columns (K = 0) needs a newer onnxruntime than 1.17, and SparseLookup, whose norm is onnxruntime's, at least two.
One infinite or NaN score makes all weights of its token NaN.
"""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper, numpy_helper

from ort_ops.gate_function import gate_nodes
from ort_ops.graph_nodes import as_function, attribute_reference, attribute_value, float_info, int_vector, node
from ort_ops.lookup_function import sparse_lookup_function
from ort_ops.panels import BLOCK_COLUMNS, PANEL_ROWS
from ort_ops.schema import (
    DOMAIN,
    OPS,
    OPSET_VERSION,
    SIGNATURE_ROUTE,
    TERNARY_FFN,
    TERNARY_TILE_MATMUL,
    OpSchema,
    TensorSchema,
)

SMALLEST = 2.0**-100  # a group of activations below it counts as zeros
_VALUE_OF_CODE = (-1.0, 0.0, 1.0, float("nan"))


def fallback_functions() -> tuple[FunctionProto, ...]:
    """One model-local function per operator of the schema, to be appended to `model.functions`."""
    return _ternary_tile_matmul(), _signature_route(), _ternary_ffn(), sparse_lookup_function()


def register_schemas() -> None:
    """Tell onnx about the operators, so that the exporter and the checker know them. May be called repeatedly."""
    for op in OPS:
        if not onnx.defs.has(op.name, DOMAIN):
            onnx.defs.register_schema(_onnx_schema(op))


def _onnx_schema(op: OpSchema) -> onnx.defs.OpSchema:
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        OPSET_VERSION,
        doc=op.doc,
        inputs=[_parameter(tensor) for tensor in op.inputs],
        outputs=[_parameter(tensor) for tensor in op.outputs],
        attributes=[
            onnx.defs.OpSchema.Attribute(attribute.name, default_value=helper.make_attribute(attribute.name, attribute.default))
            for attribute in op.attributes
        ],
    )


def _parameter(tensor: TensorSchema) -> onnx.defs.OpSchema.FormalParameter:
    types = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}
    options = onnx.defs.OpSchema.FormalParameterOption
    option = options.Optional if tensor.is_optional else options.Single
    return onnx.defs.OpSchema.FormalParameter(tensor.name, types[tensor.element_type], param_option=option)


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
        *_decode("packed_tile", "weight", "num_rows"),
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


def _signature_route() -> FunctionProto:
    """score = x @ signatures^T / sqrt(nnz); TopK of score + bias, whose ties go to the lowest index; then the gate."""
    nodes = [
        *_decode_table(),
        *_pad_columns("signatures"),
        node("Shape", ["bias"], ["num_rows"]),
        *_decode("signatures", "signature", "num_rows"),
        node("Abs", ["signature"], ["is_active"]),
        int_vector("columns_axis", [1]),
        node("ReduceSum", ["is_active", "columns_axis"], ["nnz"], keepdims=0),
        node("Constant", [], ["one"], value_float=1.0),
        node("Max", ["nnz", "one"], ["nnz_at_least_one"]),
        node("Sqrt", ["nnz_at_least_one"], ["norm"]),
        node("Reciprocal", ["norm"], ["inverse_norm"]),
        node("Gemm", ["x_padded", "signature"], ["dot"], transB=1),
        node("Mul", ["dot", "inverse_norm"], ["score"]),
        node("Add", ["score", "bias"], ["key"]),
        node("IsNaN", ["key"], ["is_nan"]),
        node("Constant", [], ["lowest"], value_float=float("-inf")),
        node("Where", ["is_nan", "lowest", "key"], ["ranked_key"]),
        attribute_value("top_k", "top_k_scalar"),
        int_vector("one_dimension", [1]),
        node("Reshape", ["top_k_scalar", "one_dimension"], ["num_chosen"]),
        # One row more for TopK: in onnxruntime 1.17 it divides by the number of rows, so no tokens would crash it.
        int_vector("row_below", [0, 0, 1, 0]),
        node("Pad", ["ranked_key", "row_below"], ["key_with_row_below"]),
        node("TopK", ["key_with_row_below", "num_chosen"], ["chosen_key", "choice_with_row_below"], axis=1),
        int_vector("first_row", [0]),
        int_vector("last_row", [-1]),
        node("Slice", ["choice_with_row_below", "first_row", "last_row", "first_row"], ["tile_idx"]),
        *gate_nodes(),
    ]
    return as_function(SIGNATURE_ROUTE, nodes)


def _ternary_ffn() -> FunctionProto:
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
        node.attribute.append(attribute_reference(attribute.name, AttributeProto.INT))
    return node


def _decode_table() -> list[NodeProto]:
    """`decode_table` [256, 4]: the four values in each byte."""
    codes = np.arange(256)[:, None] >> (2 * np.arange(4)) & 3
    table = np.array(_VALUE_OF_CODE, dtype=np.float32)[codes]
    return [node("Constant", [], ["decode_table"], value=numpy_helper.from_array(table, "decode_table"))]


def _decode(packed: str, weight: str, num_rows: str) -> list[NodeProto]:
    """Panels [P, B, 128] to their first N rows, float [N, 16 B]. Gather takes int32 or int64, so uint8 is cast."""
    panels, rows, padded = f"{packed}_panels", f"{packed}_rows", f"{packed}_padded"
    return [
        node("Cast", [packed], [f"{packed}_bytes"], to=TensorProto.INT32),
        node("Gather", ["decode_table", f"{packed}_bytes"], [f"{packed}_values"]),
        # [P, B, 128 = (32 rows, 4 j), 4 fields] -> [P, rows, B, fields, j]
        int_vector(f"{packed}_split", [0, 0, PANEL_ROWS, 4, 4]),
        node("Reshape", [f"{packed}_values", f"{packed}_split"], [panels]),
        node("Transpose", [panels], [rows], perm=[0, 2, 1, 4, 3]),
        node("Reshape", [rows, "decoded_shape"], [padded], allowzero=1),
        int_vector(f"{packed}_first", [0]),
        node("Slice", [padded, f"{packed}_first", num_rows, f"{packed}_first"], [weight]),
    ]


def _pad_columns(packed: str) -> list[NodeProto]:
    """`x_padded`: x with zero columns up to the 16 B of the panels; `decoded_shape`: [32 P, 16 B]."""
    return [
        node("Shape", ["x"], ["num_columns"], start=1),
        node("Shape", [packed], ["num_panels_and_blocks"], start=-3, end=-1),
        int_vector("panel_size", [PANEL_ROWS, BLOCK_COLUMNS]),
        node("Mul", ["num_panels_and_blocks", "panel_size"], ["decoded_shape"]),
        int_vector("columns_at", [1]),
        node("Gather", ["decoded_shape", "columns_at"], ["num_padded"]),
        node("Sub", ["num_padded", "num_columns"], ["num_padding"]),
        int_vector("no_padding", [0, 0, 0]),
        node("Concat", ["no_padding", "num_padding"], ["paddings"], axis=0),
        node("Pad", ["x", "paddings"], ["x_padded"]),
    ]


def _quantise(x: str, output: str) -> list[NodeProto]:
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
        node("ReduceMax", ["magnitude", "last_axis"], ["largest"], keepdims=1),
        node("Constant", [], ["levels"], value_float=127.0),
        node("Div", ["levels", "largest"], ["inverse"]),
        node("Constant", [], ["smallest"], value_float=SMALLEST),
        node("Less", ["largest", "smallest"], ["is_tiny"]),
        node("Constant", [], ["no_scale"], value_float=0.0),
        node("Where", ["is_tiny", "no_scale", "inverse"], ["factor"]),
        node("Mul", ["group", "factor"], ["scaled"]),
        node("Round", ["scaled"], ["q"]),
        node("Div", ["largest", "levels"], ["scale"]),
        node("Mul", ["q", "scale"], ["dequantised"]),
        node("Shape", ["x_of_groups"], ["dequantised_shape"]),
        node("Reshape", ["dequantised", "dequantised_shape"], ["dequantised_row"], allowzero=1),
        node("Slice", ["dequantised_row", "all_tokens", "num_quantised", "column_axis"], ["quantised"]),
    ]
