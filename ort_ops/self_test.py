"""Do the operators compute here what they should? Small models of each, against numpy. Needs no torch.

``python -m ort_ops.self_test`` prints one line for each path, "native" and "portable". A process of its own survives what it
finds: a kernel that the CPU cannot run ends the process, and which instruction set was chosen stands in its stderr alone.

Legend: T tokens, K columns of x, E tiles, N rows of a tile, C chosen tiles per token, H hidden values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ort_ops.functions import fallback_functions
from ort_ops.graph_nodes import ONNX_OPSET
from ort_ops.library import LibraryNotFoundError, get_library_path, session_options
from ort_ops.panels import to_panels
from ort_ops.schema import (
    DOMAIN,
    OPSET_VERSION,
    SIGNATURE_ROUTE,
    SPARSE_LOOKUP,
    TERNARY_FFN,
    TERNARY_TILE_MATMUL,
    OpSchema,
    TensorSchema,
)

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Run = Callable[..., Sequence[Array]]

PATHS = ("native", "portable")
ISA_MESSAGE = "ai.trix: kernels run with instruction set "  # what the library logs, at level INFO, when it first computes
MAX_ERROR = 1e-5  # relative to the greatest value; sums of at most 67 float32 products
_INFO = 1
_ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
_NUM_TOKENS, _NUM_TILES, _NUM_ROWS, _NUM_COLUMNS, _TOP_K = 9, 5, 11, 67, 2  # no multiple of any vector width
_SHAPES = (_NUM_TILES, _NUM_ROWS, _NUM_COLUMNS), (_NUM_TILES, _NUM_COLUMNS, _NUM_ROWS)  # of up and down
_GATES = _SIGMOID, _SOFTMAX, _ADAPTIVE = 0, 1, 2
_THRESHOLD = 0.3  # the default of the attribute confidence_threshold


def check(path: str) -> str:
    """Run the operators on random inputs: "ok: with what", "missing: why" (no library), or "wrong: why".

    Args:
        path: "native" uses the library's kernels, "portable" the operators' definition in standard ONNX operators.
    """
    try:
        run = _native if path == "native" else _portable
        checks = (_check_matmul(run), _check_ffn(run), *(_check_route(run, gate) for gate in _GATES), _check_lookup(run))
        errors = {op: error for op, error in checks if not error <= MAX_ERROR}
    except LibraryNotFoundError as error:
        return f"missing: {error}"
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        return "wrong: " + " ".join(str(error).split())
    found = ", ".join(f"relative error of {op} ({error:.1e}) must be <= {MAX_ERROR:.0e}" for op, error in errors.items())
    if errors:
        return f"wrong: {found}"
    return f"ok: {get_library_path()}" if path == "native" else "ok: standard ONNX operators"


def _check_matmul(run: Run) -> tuple[str, float]:
    rng = np.random.default_rng(0)
    weight_ENK = rng.integers(-1, 2, (_NUM_TILES, _NUM_ROWS, _NUM_COLUMNS))
    x_TK = rng.standard_normal((_NUM_TOKENS, _NUM_COLUMNS), dtype=np.float32)
    row_scale_EN = rng.uniform(0.1, 2.0, (_NUM_TILES, _NUM_ROWS)).astype(np.float32)
    tile_idx_T = rng.integers(0, _NUM_TILES, _NUM_TOKENS)
    feeds = {"x": x_TK, "packed": to_panels(weight_ENK), "row_scale": row_scale_EN, "tile_idx": tile_idx_T}
    (y_TN,) = run(TERNARY_TILE_MATMUL, feeds)
    expected_TN = np.einsum("tk,tnk->tn", x_TK.astype(np.float64), weight_ENK[tile_idx_T]) * row_scale_EN[tile_idx_T]
    return TERNARY_TILE_MATMUL.name, _relative_error(y_TN, expected_TN)


def _check_ffn(run: Run) -> tuple[str, float]:
    rng = np.random.default_rng(2)
    up_ENK, down_EKN = (rng.integers(-1, 2, shape) for shape in _SHAPES)
    x_TK = rng.standard_normal((_NUM_TOKENS, _NUM_COLUMNS), dtype=np.float32)
    up_scale_EN, down_scale_EK = (rng.uniform(0.1, 2.0, m.shape[:2]).astype(np.float32) for m in (up_ENK, down_EKN))
    weight_TC = rng.uniform(0.5, 2.0, (_NUM_TOKENS, _TOP_K)).astype(np.float32)
    tile_idx_TC = rng.integers(0, _NUM_TILES, (_NUM_TOKENS, _TOP_K))
    feeds = {"x": x_TK, "tile_idx": tile_idx_TC, "weight": weight_TC}
    feeds |= {"up": to_panels(up_ENK), "up_scale": up_scale_EN, "down": to_panels(down_EKN), "down_scale": down_scale_EK}
    (y_TK,) = run(TERNARY_FFN, feeds)
    before_TCN = np.einsum("tk,tcnk->tcn", x_TK.astype(np.float64), up_ENK[tile_idx_TC]) * up_scale_EN[tile_idx_TC]
    part_TCK = np.einsum("tcn,tckn->tck", np.maximum(before_TCN, 0.0) ** 2, down_EKN[tile_idx_TC]) * down_scale_EK[tile_idx_TC]
    return TERNARY_FFN.name, _relative_error(y_TK, np.einsum("tck,tc->tk", part_TCK, weight_TC))


def _check_route(run: Run, gate: int) -> tuple[str, float]:
    """One tile is a free slot; the gate of adaptive k uses one tile of some tokens, and two of the others."""
    rng = np.random.default_rng(1)
    signature_EK = rng.integers(-1, 2, (_NUM_TILES, _NUM_COLUMNS))
    x_TK = rng.standard_normal((_NUM_TOKENS, _NUM_COLUMNS), dtype=np.float32)
    bias_E, log_mass_E = (rng.standard_normal(_NUM_TILES, dtype=np.float32) * np.float32(0.3) for _ in range(2))
    bias_E[1] = -np.inf
    feeds = {"x": x_TK, "signatures": to_panels(signature_EK), "bias": bias_E, "log_mass": log_mass_E}
    tile_idx_TC, weight_TC, score_TE = run(SIGNATURE_ROUTE, feeds, top_k=_TOP_K, gate=gate)
    expected_TE = x_TK.astype(np.float64) @ signature_EK.T / np.sqrt(np.abs(signature_EK).sum(-1))
    best_TC = np.argsort(-(expected_TE + bias_E), axis=-1)[:, :_TOP_K]
    if not np.array_equal(tile_idx_TC, best_TC):
        return SIGNATURE_ROUTE.name, np.inf
    power_TE = np.exp(np.where(np.isneginf(bias_E), -np.inf, expected_TE))
    chosen_TC = np.take_along_axis(power_TE, best_TC, axis=1)
    if gate == _SIGMOID:
        expected_TC = chosen_TC / (1.0 + chosen_TC)
    elif gate == _SOFTMAX:
        expected_TC = chosen_TC / (power_TE * np.exp(log_mass_E)).sum(1, keepdims=True) * _NUM_TILES**0.5
    else:
        is_close_TE = power_TE >= power_TE.max(1, keepdims=True) * np.exp(-_THRESHOLD)
        chosen_TC[:, 1] *= is_close_TE.sum(1) > 1
        expected_TC = chosen_TC / chosen_TC.sum(1, keepdims=True)
    errors = _relative_error(score_TE, expected_TE), _relative_error(weight_TC, expected_TC)
    return SIGNATURE_ROUTE.name, float(np.max(errors))  # NaN where one is


def _check_lookup(run: Run) -> tuple[str, float]:
    """On splines that are 1 + 2 p + 3 p' in every tile: the interpolation is exact, and y is told in a line."""
    rng = np.random.default_rng(2)
    grid_size, num_hidden = 3, 13
    signature_EK = rng.integers(-1, 2, (_NUM_TILES, _NUM_COLUMNS))
    sizes = {"x": (_NUM_TOKENS, _NUM_COLUMNS), "norm_weight": (_NUM_COLUMNS,), "norm_bias": (_NUM_COLUMNS,)}
    sizes |= {"bias": (_NUM_TILES,), "compress": (_NUM_COLUMNS, num_hidden), "compress_bias": (num_hidden,)}
    sizes |= {"point_weight": (2, num_hidden), "point_bias": (2,), "direction": (_NUM_TILES, _NUM_COLUMNS)}
    feeds: dict[str, Array] = {name: rng.standard_normal(size, np.float32) for name, size in sizes.items()}
    place = np.linspace(-1.0, 1.0, grid_size + 1)
    corner = (1.0 + 2.0 * place[:, None] + 3.0 * place).ravel().astype(np.float32)
    feeds["compress"] /= np.float32(_NUM_COLUMNS)
    feeds |= {"routing_x": feeds["x"], "signatures": to_panels(signature_EK), "splines": np.tile(corner, (_NUM_TILES, 1))}
    feeds["gate_curve"] = np.array([0.5, 2.5], np.float32)
    y_TK, tile_idx_TK = run(SPARSE_LOOKUP, feeds, grid_size=grid_size)

    x_TK = feeds["x"].astype(np.float64)
    h_TK = (x_TK - x_TK.mean(1, keepdims=True)) / np.sqrt(x_TK.var(1, keepdims=True) + 1e-5)
    h_TK = h_TK * feeds["norm_weight"] + feeds["norm_bias"]
    score_TE = h_TK @ signature_EK.T / np.sqrt(np.abs(signature_EK).sum(-1))
    best_T = (score_TE + feeds["bias"]).argmax(1)
    if not np.array_equal(tile_idx_TK[:, 0], best_T):
        return SPARSE_LOOKUP.name, np.inf
    before_TH = h_TK @ feeds["compress"] + feeds["compress_bias"]
    hidden_TH = before_TH * (0.5 + 0.5 * np.vectorize(math.erf)(before_TH / math.sqrt(2.0)))
    point_T2 = np.tanh(hidden_TH @ feeds["point_weight"].T + feeds["point_bias"])
    gate_T = 0.5 + 2.0 / (1.0 + np.exp(-score_TE[np.arange(_NUM_TOKENS), best_T]))
    size_T = gate_T * (1.0 + point_T2 @ [2.0, 3.0])
    return SPARSE_LOOKUP.name, _relative_error(y_TK, x_TK + size_T[:, None] * feeds["direction"][best_T])


def _relative_error(found: Array, expected: NDArray[np.float64]) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _native(op: OpSchema, feeds: Arrays, **attributes: int) -> Sequence[Array]:
    options = session_options(intra_op_num_threads=1)
    options.log_severity_level = _INFO
    return _run(_model(op, attributes), options, feeds)


def _portable(op: OpSchema, feeds: Arrays, **attributes: int) -> Sequence[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = _model(op, attributes)
    model.functions.extend(fallback_functions())
    return _run(model, options, feeds)


def _model(op: OpSchema, attributes: Mapping[str, int]) -> onnx.ModelProto:
    def values(tensors: Sequence[TensorSchema]) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(t.name, _ELEMENT_TYPES[t.element_type], list(t.shape)) for t in tensors]

    inputs, outputs = ([tensor.name for tensor in tensors] for tensors in (op.inputs, op.outputs))
    node = helper.make_node(op.name, inputs, outputs, domain=DOMAIN)
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    graph = helper.make_graph([node], op.name, values(op.inputs), values(op.outputs))
    opsets = [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _run(model: onnx.ModelProto, options: onnxruntime.SessionOptions, feeds: Arrays) -> Sequence[Array]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: Sequence[Array] = session.run(None, dict(feeds))
    return outputs


def main() -> None:
    for path in PATHS:
        print(f"{path} {check(path)}", flush=True)


if __name__ == "__main__":
    main()
