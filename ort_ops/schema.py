"""The operators of domain `ai.trix`: names, inputs, outputs and attributes, as plain data.

This is the only copy on the Python side. The C++ side has one table per op in `native/ops/`; a test compares the two.

Legend: T tokens, K columns of x, D model width, E tiles, N rows of a tile or knots of a curve, H hidden values, S numbers of a
tile's spline. Packed matrices are laid out as panels.py says.
"""

from dataclasses import dataclass
from typing import Literal

DOMAIN = "ai.trix"
OPSET_VERSION = 1

ElementType = Literal["float32", "uint8", "int64"]


@dataclass(frozen=True)
class TensorSchema:
    """Name, element type and named dimensions of an input or output. is_optional: an output that a node may leave out."""

    name: str
    element_type: ElementType
    shape: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True)
class IntAttribute:
    """An optional integer attribute."""

    name: str
    default: int


@dataclass(frozen=True)
class FloatAttribute:
    """An optional float32 attribute."""

    name: str
    default: float


@dataclass(frozen=True)
class OpSchema:
    """One operator, all inputs required."""

    name: str
    inputs: tuple[TensorSchema, ...]
    outputs: tuple[TensorSchema, ...]
    attributes: tuple[IntAttribute | FloatAttribute, ...]
    doc: str


TERNARY_TILE_MATMUL = OpSchema(
    name="TernaryTileMatMul",
    inputs=(
        TensorSchema("x", "float32", ("T", "K")),
        TensorSchema("packed", "uint8", ("E", "ceil(N/32)", "ceil(K/16)", "128")),
        TensorSchema("row_scale", "float32", ("E", "N")),
        TensorSchema("tile_idx", "int64", ("T",)),
    ),
    outputs=(TensorSchema("y", "float32", ("T", "N")),),
    attributes=(IntAttribute("activation_bits", 24), IntAttribute("group_size", 128)),
    doc=(
        "y[t, n] = row_scale[e, n] * sum_k x[t, k] * w[e, n, k] with e = tile_idx[t], 0 <= e < E. x is quantised in G groups "
        "of group_size columns (128, or 0: all) with m = max |x| of the group, which counts as zeros below 2^-100. "
        "activation_bits 24: to within m * 2^-23, and sums are float32. The error is at most |row_scale| * 2^-23 * (sum_k m "
        "|w| + (3 G + 2) sum_k |x w|). Where more than 1/4 of a group's nonzero |x| are below m / 2^12, the remainder after 24 "
        "bits is quantised and multiplied too. Such tokens are as exact as in float32, without the term sum_k m |w|. 8: to "
        "round(x * (127 / m)) * m / 127."
    ),
)

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

SIGNATURE_ROUTE = OpSchema(
    name="SignatureRoute",
    inputs=(
        TensorSchema("x", "float32", ("T", "D")),
        TensorSchema("signatures", "uint8", ("ceil(E/32)", "ceil(D/16)", "128")),
        TensorSchema("bias", "float32", ("E",)),
        TensorSchema("log_mass", "float32", ("E",)),
    ),
    outputs=(
        TensorSchema("tile_idx", "int64", ("T", "top_k")),
        TensorSchema("weight", "float32", ("T", "top_k")),
        TensorSchema("score", "float32", ("T", "E"), is_optional=True),
    ),
    attributes=(IntAttribute("top_k", 1), IntAttribute("gate", 1), FloatAttribute("confidence_threshold", 0.3)),
    doc=(
        "score[t, e] = sum_d x[t, d] * s[e, d] / sqrt(max(nnz(s_e), 1)); tile_idx holds the top_k tiles by score + bias, best "
        "first, ties to the lowest index. score is without the bias. Scores are products as those of TernaryTileMatMul with 24 "
        "bits, but as exact as in float32 for more tokens: those with a group in which more than 1/4 of the nonzero |x| are "
        "below m / 2^8, more than 1/32 below m / 2^12, or any below m / 2^19. A tile is free where its bias is -inf. weight, "
        "with e = tile_idx[t, k] and f the tiles that are not free, by gate: 0 sigmoid, sigmoid(score[t, e]); 1 softmax, "
        "exp(score[t, e]) / sum_f exp(log_mass[f] + score[t, f]) * sqrt(E); 2 adaptive, the softmax among the scores of the "
        "first n chosen tiles and 0 for the rest, where n is the number of tiles f whose score is at most confidence_threshold "
        "below the largest, but at least 1 and at most top_k. Free tiles have weight 0; where all are free, gates 1 and 2 give "
        "NaN. NaN scores make weights NaN, under gate 0 those of their own tiles."
    ),
)

SPARSE_LOOKUP = OpSchema(
    name="SparseLookup",
    inputs=(
        TensorSchema("x", "float32", ("T", "D")),
        TensorSchema("routing_x", "float32", ("T", "D")),
        TensorSchema("norm_weight", "float32", ("D",)),
        TensorSchema("norm_bias", "float32", ("D",)),
        TensorSchema("signatures", "uint8", ("ceil(E/32)", "ceil(D/16)", "128")),
        TensorSchema("bias", "float32", ("E",)),
        TensorSchema("gate_curve", "float32", ("N",)),
        TensorSchema("compress", "float32", ("D", "H")),
        TensorSchema("compress_bias", "float32", ("H",)),
        TensorSchema("point_weight", "float32", ("2", "H")),
        TensorSchema("point_bias", "float32", ("2",)),
        TensorSchema("splines", "float32", ("E", "S")),
        TensorSchema("direction", "float32", ("E", "D")),
    ),
    outputs=(
        TensorSchema("y", "float32", ("T", "D")),
        TensorSchema("tile_idx", "int64", ("T", "top_k")),
    ),
    attributes=(
        IntAttribute("top_k", 1),
        IntAttribute("grid_size", 16),
        IntAttribute("has_hinges", 0),
        IntAttribute("route_on_norm", 1),
        FloatAttribute("epsilon", 1e-5),
    ),
    doc=(
        "y[t] = x[t] + sum_k gate(sigmoid(score[t, e])) * magnitude_e(point[t]) * direction[e] with e = tile_idx[t, k]. "
        "h = (x - mean) / sqrt(variance + epsilon) * norm_weight + norm_bias, each token by itself. tile_idx and score are "
        "those of SignatureRoute, which reads h, or routing_x with route_on_norm 0. "
        "point = tanh(gelu(h compress + compress_bias) point_weight^T + point_bias). gate is the piecewise "
        "linear curve through (i / (N - 1), gate_curve[i]), N >= 2. magnitude_e, by splines[e], is bilinear on "
        "grid_size x grid_size cells of [-1, 1]^2, S = (grid_size + 1)^2 corners row by row. With has_hinges 1 it is "
        "base + sum_g height_g relu(slope_g . point + offset_g), S = 4 grid_size + 1: the slopes along the first axis, "
        "those along the second, offsets, heights, base."
    ),
)

OPS = (TERNARY_TILE_MATMUL, SIGNATURE_ROUTE, TERNARY_FFN, SPARSE_LOOKUP)
