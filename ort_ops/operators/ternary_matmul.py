"""The operator TernaryMatMul: every token times one packed ternary matrix.

An operator of its own, not a TernaryTileMatMul without tile_idx: the body of a portable function cannot ask whether an input is
there, and onnxruntime 1.17 to 1.22 crashes on inputs that are left out.

Legend: B texts, T tokens, K columns of x, N rows of the matrix.
"""

import numpy as np
from onnx import FunctionProto

from ort_ops.graph_nodes import as_function, node
from ort_ops.operators.checks import NUM_COLUMNS, NUM_ROWS, NUM_TOKENS, Array, Run, relative_error
from ort_ops.operators.operator import Operator
from ort_ops.operators.packed_nodes import decode, decode_table, pad_columns
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL, quantise
from ort_ops.panels import to_panels
from ort_ops.schema import OpSchema, TensorSchema

TERNARY_MATMUL = OpSchema(
    name="TernaryMatMul",
    inputs=(
        TensorSchema("x", "float32", ("B", "T", "K")),
        TensorSchema("packed", "uint8", ("ceil(N/32)", "ceil(K/16)", "128")),
        TensorSchema("row_scale", "float32", ("N",)),
    ),
    outputs=(TensorSchema("y", "float32", ("B", "T", "N")),),
    attributes=TERNARY_TILE_MATMUL.attributes,
    doc=(
        "y[b, t, n] = row_scale[n] * sum_k x[b, t, k] * w[n, k]. Attributes, quantised x and errors are those of "
        "TernaryTileMatMul, for a token x[b, t]."
    ),
)


def _function() -> FunctionProto:
    nodes = [
        *decode_table(),
        node("Flatten", ["x"], ["x_rows"], axis=2),
        *pad_columns("packed", "x_rows"),
        *quantise("x_padded", "x_used"),
        # The matrix is taken at a place that follows from x: constant weights are not folded into floats, 16 times their size.
        node("Shape", ["x"], ["num_texts"], end=1),
        node("Sub", ["num_texts", "num_texts"], ["first_matrix"]),
        node("Unsqueeze", ["packed", "first_matrix"], ["matrices"]),
        node("Gather", ["matrices", "first_matrix"], ["gathered"]),
        node("Squeeze", ["gathered", "first_matrix"], ["packed_matrix"]),
        node("Shape", ["row_scale"], ["num_rows"]),
        *decode("packed_matrix", "weight", "num_rows"),
        node("Gemm", ["x_used", "weight"], ["product"], transB=1),
        node("Mul", ["product", "row_scale"], ["y_rows"]),
        node("Shape", ["x"], ["text_shape"], end=2),
        node("Concat", ["text_shape", "num_rows"], ["y_shape"], axis=0),
        node("Reshape", ["y_rows", "y_shape"], ["y"], allowzero=1),
    ]
    return as_function(TERNARY_MATMUL, nodes)


def _check(run: Run) -> float:
    rng = np.random.default_rng(0)
    weight_NK = rng.integers(-1, 2, (NUM_ROWS, NUM_COLUMNS))
    x_BTK = rng.standard_normal((2, NUM_TOKENS, NUM_COLUMNS), dtype=np.float32)
    row_scale_N = rng.uniform(0.1, 2.0, NUM_ROWS).astype(np.float32)
    feeds: dict[str, Array] = {"x": x_BTK, "packed": to_panels(weight_NK), "row_scale": row_scale_N}
    (y_BTN,) = run(TERNARY_MATMUL, feeds)
    return relative_error(y_BTN, x_BTK.astype(np.float64) @ weight_NK.T * row_scale_N)


OPERATOR = Operator(TERNARY_MATMUL, _function, _check)
