"""The operator SignatureRoute: the tiles whose ternary signatures agree with a token most, and how much each of them counts.

Legend: T tokens, D model width (K in the check), E tiles of a group, G groups, R = T G rows, C or top_k chosen tiles per token.
"""

from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ort_ops.graph_nodes import as_function, attribute_value, float_info, int_vector, node
from ort_ops.operators.checks import NUM_COLUMNS, NUM_TILES, NUM_TOKENS, TOP_K, Array, Run, relative_error
from ort_ops.operators.operator import Operator, Translation
from ort_ops.operators.packed_nodes import decode, decode_table, pad_columns
from ort_ops.panels import PANEL_ROWS, to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION, FloatAttribute, IntAttribute, OpSchema, TensorSchema

LEAST = -3.4028234663852886e38  # of the numbers: unlike -inf, it can be taken from itself
GATES = SIGMOID, SOFTMAX, ADAPTIVE = 0, 1, 2
_THRESHOLD = 0.3  # the default of the attribute confidence_threshold

SIGNATURE_ROUTE = OpSchema(
    name="SignatureRoute",
    inputs=(
        TensorSchema("x", "float32", ("T", "D")),
        TensorSchema("signatures", "uint8", ("G * ceil(E/32)", "ceil(D/16)", "128")),
        TensorSchema("bias", "float32", ("G * E",)),
        TensorSchema("log_mass", "float32", ("G * E",)),
    ),
    outputs=(
        TensorSchema("tile_idx", "int64", ("T", "G * top_k")),
        TensorSchema("weight", "float32", ("T", "G * top_k")),
        TensorSchema("score", "float32", ("T", "G * E"), is_optional=True),
    ),
    attributes=(
        IntAttribute("top_k", 1),
        IntAttribute("gate", 1),
        FloatAttribute("confidence_threshold", _THRESHOLD),
        IntAttribute("num_groups", 1),
    ),
    doc=(
        "score[t, e] = sum_d x[t, d] * s[e, d] / sqrt(max(nnz(s_e), 1)); tile_idx holds the top_k tiles by score + bias, best "
        "first, ties to the lowest index. score is without the bias. Scores are products as those of TernaryTileMatMul with 24 "
        "bits, but as exact as in float32 for more tokens: those with a group in which more than 1/4 of the nonzero |x| are "
        "below m / 2^8, more than 1/32 below m / 2^12, or any below m / 2^19. A tile is free where its bias is -inf. weight, "
        "with e = tile_idx[t, k] and f the tiles that are not free, by gate: 0 sigmoid, sigmoid(score[t, e]); 1 softmax, "
        "exp(score[t, e]) / sum_f exp(log_mass[f] + score[t, f]) * sqrt(E); 2 adaptive, the softmax among the scores of the "
        "first n chosen tiles and 0 for the rest, where n is the number of tiles f whose score is at most confidence_threshold "
        "below the largest, but at least 1 and at most top_k. Free tiles have weight 0; where all are free, gates 1 and 2 give "
        "NaN. NaN scores make weights NaN, under gate 0 those of their own tiles. num_groups, G, is 1 or the number of groups "
        "of E tiles, each routed as if it were alone: tile_idx counts from a group's first tile. Each of several groups begins "
        "with a panel of its own; what stands between its last tile and the next panel is not read."
    ),
)


def _function() -> FunctionProto:
    """score = x @ signatures^T / sqrt(nnz); TopK of score + bias, whose ties go to the lowest index; then the gate.

    Choice and gate are those of R rows of E tiles, one row for each group of each token.
    """
    nodes = [
        *decode_table(),
        *pad_columns("signatures"),
        *_sizes(),
        *_signatures(),
        node("Abs", ["signature"], ["is_active"]),
        int_vector("columns_axis", [1]),
        node("ReduceSum", ["is_active", "columns_axis"], ["nnz"], keepdims=0),
        node("Constant", [], ["one"], value_float=1.0),
        node("Max", ["nnz", "one"], ["nnz_at_least_one"]),
        node("Sqrt", ["nnz_at_least_one"], ["norm"]),
        node("Reciprocal", ["norm"], ["inverse_norm"]),
        node("Gemm", ["x_padded", "signature"], ["dot"], transB=1),
        node("Mul", ["dot", "inverse_norm"], ["score"]),
        node("Add", ["score", "bias"], ["token_key"]),
        *_in_rows("token_key", "key"),
        node("IsNaN", ["key"], ["is_nan"]),
        node("Constant", [], ["lowest"], value_float=float("-inf")),
        node("Where", ["is_nan", "lowest", "key"], ["ranked_key"]),
        # One row more for TopK: in onnxruntime 1.17 it divides by the number of rows, so no tokens would crash it.
        int_vector("row_below", [0, 0, 1, 0]),
        node("Pad", ["ranked_key", "row_below"], ["key_with_row_below"]),
        node("TopK", ["key_with_row_below", "num_chosen"], ["chosen_key", "choice_with_row_below"], axis=1),
        int_vector("first_row", [0]),
        int_vector("last_row", [-1]),
        node("Slice", ["choice_with_row_below", "first_row", "last_row", "first_row"], ["choice"]),
        *_gate(),
        node("Reshape", ["choice", "token_shape"], ["tile_idx"], allowzero=1),
        node("Reshape", ["row_weight", "token_shape"], ["weight"], allowzero=1),
    ]
    return as_function(SIGNATURE_ROUTE, nodes)


def _sizes() -> list[NodeProto]:
    """Vectors of one size: `num_groups` G, `num_tiles` E, `num_chosen` top_k. Shapes: `row_shape` [R, E], `token_shape`
    [T, G top_k].
    """
    return [
        int_vector("one_dimension", [1]),
        attribute_value("num_groups", "num_groups_scalar"),
        node("Reshape", ["num_groups_scalar", "one_dimension"], ["num_groups"]),
        attribute_value("top_k", "top_k_scalar"),
        node("Reshape", ["top_k_scalar", "one_dimension"], ["num_chosen"]),
        node("Shape", ["bias"], ["num_all_tiles"]),
        # By a reshape: a division by a num_groups of 0 would end the process.
        int_vector("rest", [-1]),
        node("Concat", ["num_groups", "rest"], ["groups_of_tiles"], axis=0),
        node("Reshape", ["bias", "groups_of_tiles"], ["group_bias"]),
        node("Shape", ["group_bias"], ["num_tiles"], start=1),
        node("Shape", ["x"], ["num_tokens"], start=0, end=1),
        node("Mul", ["num_tokens", "num_groups"], ["num_token_rows"]),
        node("Concat", ["num_token_rows", "num_tiles"], ["row_shape"], axis=0),
        node("Mul", ["num_groups", "num_chosen"], ["num_chosen_in_all"]),
        node("Concat", ["num_tokens", "num_chosen_in_all"], ["token_shape"], axis=0),
    ]


def _signatures() -> list[NodeProto]:
    """`signature` [G E, 16 B]: the first E rows of each group's panels."""
    return [
        int_vector("rows_at", [0]),
        node("Gather", ["decoded_shape", "rows_at"], ["num_rows"]),
        *decode("signatures", "row", "num_rows"),
        int_vector("panel_rows", [PANEL_ROWS]),
        int_vector("last_of_panel", [PANEL_ROWS - 1]),
        node("Add", ["num_tiles", "last_of_panel"], ["up_to_next_panel"]),
        node("Div", ["up_to_next_panel", "panel_rows"], ["num_group_panels"]),
        node("Mul", ["num_group_panels", "panel_rows"], ["num_group_rows"]),
        node("Concat", ["num_groups", "num_group_rows", "num_padded"], ["group_shape"], axis=0),
        node("Reshape", ["row", "group_shape"], ["group_row"], allowzero=1),
        int_vector("first_tile", [0]),
        int_vector("tiles_at", [1]),
        node("Slice", ["group_row", "first_tile", "num_tiles", "tiles_at"], ["group_signature"]),
        node("Concat", ["num_all_tiles", "num_padded"], ["signature_shape"], axis=0),
        node("Reshape", ["group_signature", "signature_shape"], ["signature"], allowzero=1),
    ]


def _in_rows(of_tokens: str, of_rows: str) -> list[NodeProto]:
    return [node("Reshape", [of_tokens, "row_shape"], [of_rows], allowzero=1)]


def _gate() -> list[NodeProto]:
    """`row_weight` [R, top_k] from score [T, G E], choice [R, top_k], bias [G E] and log_mass [G E].

    Exp and sums instead of Softmax, as what that gives for a row of -inf, or with NaN, is left open.
    """
    branches = {name: helper.make_graph(make(), name, [], [float_info(name)]) for name, make in _BRANCHES.items()}
    return [
        attribute_value("gate", "gate"),
        node("Constant", [], ["sigmoid_gate"], value_int=0),
        node("Constant", [], ["softmax_gate"], value_int=1),
        node("Constant", [], ["no_weight"], value_float=0.0),
        int_vector("tile_axis", [1]),
        node("Equal", ["bias", "lowest"], ["tile_is_free"]),
        node("Shape", ["score"], ["score_shape"]),
        node("Expand", ["tile_is_free", "score_shape"], ["token_is_free"]),
        *_in_rows("token_is_free", "is_free"),
        *_in_rows("score", "row_score"),
        node("Add", ["score", "log_mass"], ["token_exponent"]),
        *_in_rows("token_exponent", "exponent"),
        node("GatherElements", ["is_free", "choice"], ["chosen_is_free"], axis=1),
        node("GatherElements", ["row_score", "choice"], ["chosen_score"], axis=1),
        node("Equal", ["gate", "sigmoid_gate"], ["is_sigmoid"]),
        node("Equal", ["gate", "softmax_gate"], ["is_softmax"]),
        node(
            "If",
            ["is_sigmoid"],
            ["weight_of_numbers"],
            then_branch=branches["sigmoid_weight"],
            else_branch=helper.make_graph(
                [
                    node(
                        "If",
                        ["is_softmax"],
                        ["normalised_weight"],
                        then_branch=branches["softmax_weight"],
                        else_branch=branches["adaptive_weight"],
                    )
                ],
                "normalised_graph",
                [],
                [float_info("normalised_weight")],
            ),
        ),
        # 0, or NaN where a score is none of the numbers: what exp and comparisons make of NaN is not certain.
        node("Mul", ["row_score", "no_weight"], ["nothing"]),
        node("ReduceSum", ["nothing", "tile_axis"], ["zero_or_nan"], keepdims=1),
        node("Add", ["weight_of_numbers", "zero_or_nan"], ["row_weight"]),
    ]


def _sigmoid() -> list[NodeProto]:
    return [
        node("Sigmoid", ["chosen_score"], ["share"]),
        node("Where", ["chosen_is_free", "no_weight", "share"], ["sigmoid_weight"]),
    ]


def _softmax() -> list[NodeProto]:
    return [
        node("Constant", [], ["least"], value_float=LEAST),
        node("Where", ["is_free", "least", "exponent"], ["exponent_in_use"]),
        node("ReduceMax", ["exponent_in_use", "tile_axis"], ["largest_exponent"], keepdims=1),
        node("Sub", ["exponent_in_use", "largest_exponent"], ["lowered"]),
        node("Exp", ["lowered"], ["power"]),
        node("Where", ["is_free", "no_weight", "power"], ["power_in_use"]),
        node("ReduceSum", ["power_in_use", "tile_axis"], ["sum_of_powers"], keepdims=1),
        node("Sub", ["chosen_score", "largest_exponent"], ["chosen_lowered"]),
        node("Exp", ["chosen_lowered"], ["chosen_power"]),
        node("Where", ["chosen_is_free", "no_weight", "chosen_power"], ["counted_power"]),
        node("Div", ["counted_power", "sum_of_powers"], ["softmax_share"]),
        node("Cast", ["num_tiles"], ["num_tiles_float"], to=TensorProto.FLOAT),
        node("Sqrt", ["num_tiles_float"], ["root"]),
        node("Mul", ["softmax_share", "root"], ["softmax_weight"]),
    ]


def _adaptive() -> list[NodeProto]:
    return [
        attribute_value("confidence_threshold", "threshold", AttributeProto.FLOAT),
        node("Where", ["is_free", "lowest", "row_score"], ["score_in_use"]),
        node("ReduceMax", ["score_in_use", "tile_axis"], ["best_score"], keepdims=1),
        node("Sub", ["best_score", "score_in_use"], ["gap"]),
        node("LessOrEqual", ["gap", "threshold"], ["is_close"]),
        node("Cast", ["is_close"], ["close"], to=TensorProto.INT64),
        node("ReduceSum", ["close", "tile_axis"], ["num_close"], keepdims=1),
        node("Constant", [], ["one_tile"], value_int=1),
        node("Max", ["num_close", "one_tile"], ["num_used"]),
        node("Constant", [], ["first_place"], value_int=0),
        node("Range", ["first_place", "top_k_scalar", "one_tile"], ["place"]),
        node("Less", ["place", "num_used"], ["is_used"]),
        node("Not", ["chosen_is_free"], ["chosen_is_in_use"]),
        node("And", ["is_used", "chosen_is_in_use"], ["is_counted"]),
        node("Constant", [], ["least_score"], value_float=LEAST),
        node("Where", ["is_counted", "chosen_score", "least_score"], ["counted_score"]),
        node("ReduceMax", ["counted_score", "tile_axis"], ["best_counted"], keepdims=1),
        node("Sub", ["counted_score", "best_counted"], ["counted_gap"]),
        node("Exp", ["counted_gap"], ["gap_power"]),
        node("Where", ["is_counted", "gap_power", "no_weight"], ["used_power"]),
        node("ReduceSum", ["used_power", "tile_axis"], ["sum_of_used"], keepdims=1),
        node("Div", ["used_power", "sum_of_used"], ["adaptive_weight"]),
    ]


_BRANCHES = {"sigmoid_weight": _sigmoid, "softmax_weight": _softmax, "adaptive_weight": _adaptive}


def _check(run: Run) -> float:
    return float(np.max([check_gate(run, gate) for gate in GATES]))  # NaN where one is


def check_gate(run: Run, gate: int) -> float:
    """One tile is a free slot; the gate of adaptive k uses one tile of some tokens, and two of the others."""
    rng = np.random.default_rng(1)
    signature_EK = rng.integers(-1, 2, (NUM_TILES, NUM_COLUMNS))
    x_TK = rng.standard_normal((NUM_TOKENS, NUM_COLUMNS), dtype=np.float32)
    bias_E, log_mass_E = (rng.standard_normal(NUM_TILES, dtype=np.float32) * np.float32(0.3) for _ in range(2))
    bias_E[1] = -np.inf
    feeds: dict[str, Array] = {"x": x_TK, "signatures": to_panels(signature_EK), "bias": bias_E, "log_mass": log_mass_E}
    tile_idx_TC, weight_TC, score_TE = run(SIGNATURE_ROUTE, feeds, top_k=TOP_K, gate=gate)
    expected_TE = x_TK.astype(np.float64) @ signature_EK.T / np.sqrt(np.abs(signature_EK).sum(-1))
    best_TC = np.argsort(-(expected_TE + bias_E), axis=-1)[:, :TOP_K]
    if not np.array_equal(tile_idx_TC, best_TC):
        return np.inf
    power_TE = np.exp(np.where(np.isneginf(bias_E), -np.inf, expected_TE))
    chosen_TC = np.take_along_axis(power_TE, best_TC, axis=1)
    if gate == SIGMOID:
        expected_TC = chosen_TC / (1.0 + chosen_TC)
    elif gate == SOFTMAX:
        expected_TC = chosen_TC / (power_TE * np.exp(log_mass_E)).sum(1, keepdims=True) * NUM_TILES**0.5
    else:
        is_close_TE = power_TE >= power_TE.max(1, keepdims=True) * np.exp(-_THRESHOLD)
        chosen_TC[:, 1] *= is_close_TE.sum(1) > 1
        expected_TC = chosen_TC / chosen_TC.sum(1, keepdims=True)
    errors = relative_error(score_TE, expected_TE), relative_error(weight_TC, expected_TC)
    return float(np.max(errors))  # NaN where one is


def _translations() -> dict[Any, Translation]:
    import torch
    from onnxscript.values import Opset

    opset = Opset(DOMAIN, OPSET_VERSION)

    def translate(*inputs: Any) -> Any:
        *tensors, top_k, gate, confidence_threshold = inputs
        return opset.SignatureRoute(*tensors, top_k=top_k, gate=gate, confidence_threshold=confidence_threshold)

    return {torch.ops.trix.signature_route.default: translate}


OPERATOR = Operator(SIGNATURE_ROUTE, _function, _check, _translations)
