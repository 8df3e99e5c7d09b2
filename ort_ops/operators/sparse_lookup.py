"""The operator SparseLookup: a whole sparse lookup layer, from its norm to its residual sum.

Legend: T tokens, D model width (K in the check), E tiles, K tiles per token, N knots of a curve, H hidden values,
S numbers of a tile's spline, G grid_size.
"""

import math
from typing import Any

import numpy as np
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper

from ort_ops.graph_nodes import ONNX_OPSET, as_function, attribute_reference, attribute_value, float_info, int_vector, node
from ort_ops.operators.checks import NUM_COLUMNS, NUM_TILES, NUM_TOKENS, Array, Run, relative_error
from ort_ops.operators.operator import Operator, Translation
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION, FloatAttribute, IntAttribute, OpSchema, TensorSchema

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


def sparse_lookup_function() -> FunctionProto:
    """Norm and routing (by SignatureRoute's own function), points, gates [T, K] and magnitudes [T, K], and what they weigh."""
    grid = helper.make_graph(_grid_magnitude(), "grid", [], [float_info("grid_magnitude")])
    hinges = helper.make_graph(_hinge_magnitude(), "hinges", [], [float_info("hinge_magnitude")])
    nodes = [
        node("Constant", [], ["half"], value_float=0.5),
        node("Constant", [], ["one"], value_float=1.0),
        node("Constant", [], ["one_step"], value_int=1),
        node("Constant", [], ["no_step"], value_int=0),
        *_routing(),
        node("Gemm", ["h", "compress", "compress_bias"], ["before"]),
        node("Constant", [], ["sqrt_half"], value_float=0.5**0.5),
        node("Mul", ["before", "sqrt_half"], ["scaled"]),
        node("Erf", ["scaled"], ["erf"]),
        node("Add", ["erf", "one"], ["twice_share"]),
        node("Mul", ["before", "twice_share"], ["twice_hidden"]),
        node("Mul", ["twice_hidden", "half"], ["hidden"]),
        node("Gemm", ["hidden", "point_weight", "point_bias"], ["before_tanh"], transB=1),
        node("Tanh", ["before_tanh"], ["point"]),
        node("Size", ["gate_curve"], ["num_knots"]),
        node("Sub", ["num_knots", "one_step"], ["num_segments"]),
        *_steps("share", "num_segments", "segment", "part"),
        node("Add", ["segment", "one_step"], ["next_knot"]),
        node("Gather", ["gate_curve", "segment"], ["gate_start"]),
        node("Gather", ["gate_curve", "next_knot"], ["gate_end"]),
        node("Sub", ["gate_end", "gate_start"], ["gate_rise"]),
        node("Mul", ["gate_rise", "part"], ["gate_step"]),
        node("Add", ["gate_start", "gate_step"], ["gate"]),
        int_vector("first_axis", [0]),
        int_vector("second_axis", [1]),
        int_vector("last_axis", [2]),
        attribute_value("grid_size", "grid"),
        attribute_value("has_hinges", "hinges_flag"),
        node("Equal", ["hinges_flag", "one_step"], ["is_hinged"]),
        node("If", ["is_hinged"], ["magnitude"], then_branch=hinges, else_branch=grid),
        node("Mul", ["gate", "magnitude"], ["size"]),
        node("Unsqueeze", ["size", "last_axis"], ["size_column"]),
        node("Gather", ["direction", "tile_idx"], ["chosen_direction"]),
        node("Mul", ["size_column", "chosen_direction"], ["summand"]),
        node("ReduceSum", ["summand", "second_axis"], ["update"], keepdims=0),
        node("Add", ["x", "update"], ["y"]),
    ]
    return as_function(SPARSE_LOOKUP, nodes)


def _routing() -> list[NodeProto]:
    """`h`, the norm of x; `tile_idx` by the signatures' agreement with it or with routing_x, and `share`, its sigmoid."""
    norm = node("LayerNormalization", ["x", "norm_weight", "norm_bias"], ["h"])
    norm.attribute.append(attribute_reference("epsilon", AttributeProto.FLOAT))
    # This gate reads no mass, so any [E] will do. Inference refuses a call inside a function that leaves out an output.
    read, answered = ["routed", "signatures", "bias", "bias"], ["tile_idx", "share", "score"]
    route = node(SIGNATURE_ROUTE.name, read, answered, domain=DOMAIN, gate=0)
    route.attribute.append(attribute_reference("top_k", AttributeProto.INT))
    of_norm, given = (
        helper.make_graph([node("Identity", [source], [output])], output, [], [float_info(output)])
        for source, output in (("h", "routed_norm"), ("routing_x", "routed_as_given"))
    )
    return [
        norm,
        attribute_value("route_on_norm", "route_on_norm_flag"),
        node("Equal", ["route_on_norm_flag", "one_step"], ["is_of_norm"]),
        node("If", ["is_of_norm"], ["routed"], then_branch=of_norm, else_branch=given),
        route,
    ]


def _steps(share: str, num_steps: str, whole: str, part: str) -> list[NodeProto]:
    """Where a share in [0, 1] lies on num_steps equal steps: which step, int64, and how far in it."""
    position, below, last = f"{whole}_position", f"{whole}_below", f"{whole}_last"
    return [
        node("Cast", [num_steps], [f"{whole}_count"], to=TensorProto.FLOAT),
        node("Mul", [share, f"{whole}_count"], [position]),
        node("Cast", [position], [below], to=TensorProto.INT64),
        node("Sub", [num_steps, "one_step"], [last]),
        node("Min", [below, last], [f"{whole}_at_most"]),
        node("Max", [f"{whole}_at_most", "no_step"], [whole]),
        node("Cast", [whole], [f"{whole}_float"], to=TensorProto.FLOAT),
        node("Sub", [position, f"{whole}_float"], [part]),
    ]


def _grid_magnitude() -> list[NodeProto]:
    nodes = [
        node("Add", ["point", "one"], ["from_corner"]),
        node("Mul", ["from_corner", "half"], ["place"]),
        *_steps("place", "grid", "cell", "high"),
        node("Sub", ["one", "high"], ["low"]),
        node("Add", ["grid", "one_step"], ["corners"]),
        node("Mul", ["corners", "corners"], ["num_values"]),
        node("Mul", ["tile_idx", "num_values"], ["first_of_tile"]),
        node("Gather", ["cell", "first_axis"], ["cell_row"], axis=1),
        node("Gather", ["cell", "second_axis"], ["cell_column"], axis=1),
        node("Mul", ["cell_row", "corners"], ["first_of_row"]),
        node("Add", ["first_of_row", "cell_column"], ["cell_place"]),
        node("Add", ["first_of_tile", "cell_place"], ["low_low_place"]),
        node("Add", ["low_low_place", "one_step"], ["low_high_place"]),
        node("Add", ["low_low_place", "corners"], ["high_low_place"]),
        node("Add", ["low_high_place", "corners"], ["high_high_place"]),
        int_vector("flat", [-1]),
        node("Reshape", ["splines", "flat"], ["corner_values"]),
    ]
    for side in ("low", "high"):
        nodes.append(node("Gather", [side, "first_axis"], [f"{side}_row"], axis=1))
        nodes.append(node("Gather", [side, "second_axis"], [f"{side}_column"], axis=1))
    terms = []
    for corner in ("low_low", "low_high", "high_low", "high_high"):
        row, column = corner.split("_")
        nodes += [
            node("Gather", ["corner_values", f"{corner}_place"], [f"{corner}_value"]),
            node("Mul", [f"{row}_row", f"{column}_column"], [f"{corner}_weight"]),
            node("Mul", [f"{corner}_weight", f"{corner}_value"], [f"{corner}_term"]),
        ]
        terms.append(f"{corner}_term")
    return [*nodes, node("Sum", terms, ["grid_magnitude"])]


def _hinge_magnitude() -> list[NodeProto]:
    """Five parts of the rows [T, K, 4 G + 1]; points as columns [T, 1, 1].

    Cut out one by one: shape inference would refuse a Split of rows that belong to the other branch.
    """
    cut = []
    for place, part in enumerate(("slope", "other_slope", "offset", "height")):
        cut += [
            int_vector(f"{part}_place", [place]),
            node("Mul", ["num_hinges", f"{part}_place"], [f"{part}_start"]),
            node("Add", [f"{part}_start", "num_hinges"], [f"{part}_end"]),
            node("Slice", ["spline", f"{part}_start", f"{part}_end", "last_axis"], [part]),
        ]
    return [
        node("Gather", ["splines", "tile_idx"], ["spline"]),
        node("Reshape", ["grid", "second_axis"], ["num_hinges"]),
        *cut,
        int_vector("last_column", [-1]),
        node("Gather", ["spline", "last_column"], ["base"], axis=2),
        node("Unsqueeze", ["point", "last_axis"], ["coordinates"]),
        node("Gather", ["coordinates", "first_axis"], ["coordinate"], axis=1),
        node("Gather", ["coordinates", "second_axis"], ["other_coordinate"], axis=1),
        node("Mul", ["slope", "coordinate"], ["along"]),
        node("Mul", ["other_slope", "other_coordinate"], ["along_other"]),
        node("Add", ["offset", "along"], ["crease_along"]),
        node("Add", ["crease_along", "along_other"], ["crease"]),
        node("Relu", ["crease"], ["bent"]),
        node("Mul", ["bent", "height"], ["hinge"]),
        node("ReduceSum", ["hinge", "last_axis"], ["hinges"], keepdims=0),
        node("Squeeze", ["base", "last_axis"], ["base_value"]),
        node("Add", ["hinges", "base_value"], ["hinge_magnitude"]),
    ]


def _check(run: Run) -> float:
    """On splines that are 1 + 2 p + 3 p' in every tile: the interpolation is exact, and y is told in a line."""
    rng = np.random.default_rng(2)
    grid_size, num_hidden = 3, 13
    signature_EK = rng.integers(-1, 2, (NUM_TILES, NUM_COLUMNS))
    sizes = {"x": (NUM_TOKENS, NUM_COLUMNS), "norm_weight": (NUM_COLUMNS,), "norm_bias": (NUM_COLUMNS,)}
    sizes |= {"bias": (NUM_TILES,), "compress": (NUM_COLUMNS, num_hidden), "compress_bias": (num_hidden,)}
    sizes |= {"point_weight": (2, num_hidden), "point_bias": (2,), "direction": (NUM_TILES, NUM_COLUMNS)}
    feeds: dict[str, Array] = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    place = np.linspace(-1.0, 1.0, grid_size + 1)
    corner = (1.0 + 2.0 * place[:, None] + 3.0 * place).ravel().astype(np.float32)
    feeds["compress"] /= np.float32(NUM_COLUMNS)
    feeds |= {"routing_x": feeds["x"], "signatures": to_panels(signature_EK), "splines": np.tile(corner, (NUM_TILES, 1))}
    feeds["gate_curve"] = np.array([0.5, 2.5], np.float32)
    y_TK, tile_idx_TK = run(SPARSE_LOOKUP, feeds, grid_size=grid_size)

    x_TK = feeds["x"].astype(np.float64)
    h_TK = (x_TK - x_TK.mean(1, keepdims=True)) / np.sqrt(x_TK.var(1, keepdims=True) + 1e-5)
    h_TK = h_TK * feeds["norm_weight"] + feeds["norm_bias"]
    score_TE = h_TK @ signature_EK.T / np.sqrt(np.abs(signature_EK).sum(-1))
    best_T = (score_TE + feeds["bias"]).argmax(1)
    if not np.array_equal(tile_idx_TK[:, 0], best_T):
        return np.inf
    before_TH = h_TK @ feeds["compress"] + feeds["compress_bias"]
    hidden_TH = before_TH * (0.5 + 0.5 * np.vectorize(math.erf)(before_TH / math.sqrt(2.0)))
    point_T2 = np.tanh(hidden_TH @ feeds["point_weight"].T + feeds["point_bias"])
    gate_T = 0.5 + 2.0 / (1.0 + np.exp(-score_TE[np.arange(NUM_TOKENS), best_T]))
    size_T = gate_T * (1.0 + point_T2 @ [2.0, 3.0])
    return relative_error(y_TK, x_TK + size_T[:, None] * feeds["direction"][best_T])


def _translations() -> dict[Any, Translation]:
    import torch
    from onnxscript.values import Opset

    opset, standard = Opset(DOMAIN, OPSET_VERSION), Opset("", ONNX_OPSET)

    def gelu(x: Any) -> Any:
        half, one = standard.Constant(value_float=0.5), standard.Constant(value_float=1.0)
        erf = standard.Erf(standard.Mul(x, standard.Constant(value_float=math.sqrt(0.5))))
        return standard.Mul(half, standard.Mul(x, standard.Add(erf, one)))

    def translate(*inputs: Any) -> Any:
        *tensors, top_k, grid_size, has_hinges, route_on_norm, epsilon = inputs
        flags = {"has_hinges": int(has_hinges), "route_on_norm": int(route_on_norm)}
        y, tile_idx = opset.SparseLookup(*tensors, top_k=top_k, grid_size=grid_size, **flags, epsilon=epsilon)
        # The operator keeps score and point to itself. Where nothing reads them, as in most models, these nodes fall away.
        x, routing_x, norm_weight, norm_bias, panels, bias, _, compress, compress_bias, point_weight, point_bias, *_ = tensors
        h, *_ = standard.LayerNormalization(x, norm_weight, norm_bias, epsilon=epsilon)
        _, _, score = opset.SignatureRoute(h if route_on_norm else routing_x, panels, bias, bias, top_k=top_k, gate=0)
        hidden = gelu(standard.Gemm(h, compress, compress_bias))
        return y, tile_idx, score, standard.Tanh(standard.Gemm(hidden, point_weight, point_bias, transB=1))

    return {torch.ops.trix.sparse_lookup.default: translate}


OPERATOR = Operator(SPARSE_LOOKUP, sparse_lookup_function, _check, _translations)
