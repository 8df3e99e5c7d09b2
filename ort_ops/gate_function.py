"""The gate of SignatureRoute written in standard ONNX operators: how much each chosen tile counts.

Exp and sums instead of Softmax, as what that gives for a row of -inf, or with NaN, is left open.
"""

from onnx import AttributeProto, NodeProto, TensorProto, helper

from ort_ops.graph_nodes import attribute_value, float_info, int_vector, node

LEAST = -3.4028234663852886e38  # of the numbers: unlike -inf, it can be taken from itself


def gate_nodes() -> list[NodeProto]:
    """weight [T, K] from score [T, E], tile_idx [T, K], bias [E] and log_mass [E]."""
    branches = {name: helper.make_graph(make(), name, [], [float_info(name)]) for name, make in _BRANCHES.items()}
    return [
        attribute_value("gate", "gate"),
        node("Constant", [], ["sigmoid_gate"], value_int=0),
        node("Constant", [], ["softmax_gate"], value_int=1),
        node("Constant", [], ["no_weight"], value_float=0.0),
        int_vector("tile_axis", [1]),
        node("Equal", ["bias", "lowest"], ["is_free"]),
        node("Gather", ["is_free", "tile_idx"], ["chosen_is_free"]),
        node("GatherElements", ["score", "tile_idx"], ["chosen_score"], axis=1),
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
        node("Mul", ["score", "no_weight"], ["nothing"]),
        node("ReduceSum", ["nothing", "tile_axis"], ["zero_or_nan"], keepdims=1),
        node("Add", ["weight_of_numbers", "zero_or_nan"], ["weight"]),
    ]


def _sigmoid() -> list[NodeProto]:
    return [
        node("Sigmoid", ["chosen_score"], ["share"]),
        node("Where", ["chosen_is_free", "no_weight", "share"], ["sigmoid_weight"]),
    ]


def _softmax() -> list[NodeProto]:
    return [
        node("Add", ["score", "log_mass"], ["exponent"]),
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
        node("Size", ["bias"], ["num_tiles"]),
        node("Cast", ["num_tiles"], ["num_tiles_float"], to=TensorProto.FLOAT),
        node("Sqrt", ["num_tiles_float"], ["root"]),
        node("Mul", ["softmax_share", "root"], ["softmax_weight"]),
    ]


def _adaptive() -> list[NodeProto]:
    return [
        attribute_value("confidence_threshold", "threshold", AttributeProto.FLOAT),
        node("Where", ["is_free", "lowest", "score"], ["score_in_use"]),
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
