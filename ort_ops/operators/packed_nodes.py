"""Packed ternary matrices in standard ONNX operators: panels (panels.py) to floats, and x padded to their columns."""

import numpy as np
from onnx import NodeProto, TensorProto, numpy_helper

from ort_ops.graph_nodes import int_vector, node
from ort_ops.panels import BLOCK_COLUMNS, PANEL_ROWS

_VALUE_OF_CODE = (-1.0, 0.0, 1.0, float("nan"))


def decode_table() -> list[NodeProto]:
    """`decode_table` [256, 4]: the four values in each byte."""
    codes = np.arange(256)[:, None] >> (2 * np.arange(4)) & 3
    table = np.array(_VALUE_OF_CODE, dtype=np.float32)[codes]
    return [node("Constant", [], ["decode_table"], value=numpy_helper.from_array(table, "decode_table"))]


def decode(packed: str, weight: str, num_rows: str) -> list[NodeProto]:
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


def pad_columns(packed: str, x: str = "x") -> list[NodeProto]:
    """`x_padded`: x [T, K] with zero columns up to the 16 B of the panels; `decoded_shape`: [32 P, 16 B]."""
    return [
        node("Shape", [x], ["num_columns"], start=1),
        node("Shape", [packed], ["num_panels_and_blocks"], start=-3, end=-1),
        int_vector("panel_size", [PANEL_ROWS, BLOCK_COLUMNS]),
        node("Mul", ["num_panels_and_blocks", "panel_size"], ["decoded_shape"]),
        int_vector("columns_at", [1]),
        node("Gather", ["decoded_shape", "columns_at"], ["num_padded"]),
        node("Sub", ["num_padded", "num_columns"], ["num_padding"]),
        int_vector("no_padding", [0, 0, 0]),
        node("Concat", ["no_padding", "num_padding"], ["paddings"], axis=0),
        node("Pad", [x, "paddings"], ["x_padded"]),
    ]
