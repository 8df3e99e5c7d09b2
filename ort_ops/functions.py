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

from ort_ops.schema import DOMAIN, OPS, OPSET_VERSION, SIGNATURE_ROUTE, TERNARY_TILE_MATMUL, OpSchema

ONNX_OPSET = 18

_VALUE_OF_CODE = (0.0, 1.0, -1.0, float("nan"))


def fallback_functions() -> tuple[FunctionProto, ...]:
    """One model-local function per operator of the schema, to be appended to `model.functions`."""
    return _ternary_tile_matmul(), _signature_route()


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
        _node("GatherND", ["x_padded", "token_column"], ["x_tile"]),
        _node("Gather", ["packed", "tile"], ["packed_tile"]),
        *_decode("packed_tile", "weight"),
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
        *_decode("signatures", "signature"),
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


def _decode_table() -> list[NodeProto]:
    """`decode_table` [256, 4]: the four values in each byte."""
    codes = np.arange(256)[:, None] >> (2 * np.arange(4)) & 3
    table = np.array(_VALUE_OF_CODE, dtype=np.float32)[codes]
    return [_node("Constant", [], ["decode_table"], value=numpy_helper.from_array(table, "decode_table"))]


def _decode(packed: str, weight: str) -> list[NodeProto]:
    """[N, P] bytes to [N, 4P] floats, `decoded_shape`. Gather takes int32 or int64 indices, so uint8 is cast first."""
    return [
        _node("Cast", [packed], [f"{packed}_bytes"], to=TensorProto.INT32),
        _node("Gather", ["decode_table", f"{packed}_bytes"], [f"{packed}_values"]),
        _node("Reshape", [f"{packed}_values", "decoded_shape"], [weight], allowzero=1),
    ]


def _pad_columns(packed: str) -> list[NodeProto]:
    """`x_padded`: x with zero columns up to the 4P that the packed rows decode to; `decoded_shape`: [N, 4P]."""
    return [
        _node("Shape", ["x"], ["num_columns"], start=1),
        _node("Shape", [packed], ["row_bytes"], start=-1),
        _int_vector("codes_per_byte", [4]),
        _node("Mul", ["row_bytes", "codes_per_byte"], ["num_codes"]),
        _node("Sub", ["num_codes", "num_columns"], ["num_padding"]),
        _int_vector("no_padding", [0, 0, 0]),
        _node("Concat", ["no_padding", "num_padding"], ["paddings"], axis=0),
        _node("Pad", ["x", "paddings"], ["x_padded"]),
        _node("Shape", [packed], ["num_decoded_rows"], start=-2, end=-1),
        _node("Concat", ["num_decoded_rows", "num_codes"], ["decoded_shape"], axis=0),
    ]


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
        [helper.make_opsetid("", ONNX_OPSET)],
        attributes=[],
        attribute_protos=[helper.make_attribute(attribute.name, attribute.default) for attribute in op.attributes],
        doc_string=op.doc,
    )
