"""Do the operators compute here what they should? Small models of both, against numpy. Needs no torch.

``python -m ort_ops.self_test`` prints one line for each path, "native" and "portable". A process of its own survives what it
finds: a kernel that the CPU cannot run ends the process, and which instruction set was chosen stands in its stderr alone.

Legend: T tokens, K columns of x, E tiles, N rows of a tile.
"""

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
from ort_ops.schema import DOMAIN, OPSET_VERSION, SIGNATURE_ROUTE, TERNARY_TILE_MATMUL, OpSchema, TensorSchema

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Run = Callable[..., Sequence[Array]]

PATHS = ("native", "portable")
ISA_MESSAGE = "ai.trix: kernels run with instruction set "  # what the library logs, at level INFO, when it first computes
MAX_ERROR = 1e-5  # relative to the greatest value; sums of 67 float32 products
_INFO = 1
_ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
_NUM_TOKENS, _NUM_TILES, _NUM_ROWS, _NUM_COLUMNS, _TOP_K = 9, 5, 11, 67, 2  # no multiple of any vector width


def check(path: str) -> str:
    """Run both operators on random inputs: "ok: with what", "missing: why" (no library), or "wrong: why".

    Args:
        path: "native" uses the library's kernels, "portable" the operators' definition in standard ONNX operators.
    """
    try:
        run = _native if path == "native" else _portable
        errors = {op: error for op, error in (_check_matmul(run), _check_route(run)) if not error <= MAX_ERROR}
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


def _check_route(run: Run) -> tuple[str, float]:
    rng = np.random.default_rng(1)
    signature_EK = rng.integers(-1, 2, (_NUM_TILES, _NUM_COLUMNS))
    x_TK = rng.standard_normal((_NUM_TOKENS, _NUM_COLUMNS), dtype=np.float32)
    bias_E = rng.standard_normal(_NUM_TILES, dtype=np.float32)
    feeds = {"x": x_TK, "signatures": to_panels(signature_EK), "bias": bias_E}
    tile_idx_TK, score_TE = run(SIGNATURE_ROUTE, feeds, top_k=_TOP_K)
    expected_TE = x_TK.astype(np.float64) @ signature_EK.T / np.sqrt(np.abs(signature_EK).sum(-1))
    best_TK = np.argsort(-(expected_TE + bias_E), axis=-1)[:, :_TOP_K]
    if not np.array_equal(tile_idx_TK, best_TK):
        return SIGNATURE_ROUTE.name, np.inf
    return SIGNATURE_ROUTE.name, _relative_error(score_TE, expected_TE)


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
