"""The products, layers and routers of `cases/kernels.py` as models of their own, ours and those that they stand beside."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ort_ops.library import session_options
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.ternary_ffn import TERNARY_FFN
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION

OURS = {
    "trix 8 bit": {"activation_bits": 8, "group_size": 0},
    "trix 8 bit, groups": {"activation_bits": 8, "group_size": 128},
    "trix 24 bit": {"activation_bits": 24, "group_size": 128},
}
SCALE = 2.0**-6  # of the weights, so that values in a stack stay of one size
Run = Callable[[], Any]


def session(model: onnx.ModelProto, num_threads: int, is_native: bool) -> ort.InferenceSession:
    options = session_options() if is_native else ort.SessionOptions()
    options.intra_op_num_threads = num_threads
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def graph_model(
    nodes: Iterable[onnx.NodeProto], constants: dict[str, np.ndarray], inputs: dict[str, int] | None = None
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "K"])]
    shapes = {"tile_idx": ["T"], "choice": ["T", 1], "weight": ["T", 1]}
    values += [helper.make_tensor_value_info(name, kind, shapes[name]) for name, kind in (inputs or {}).items()]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    output = onnx.ValueInfoProto(name="y")
    graph = helper.make_graph(list(nodes), "benchmark", values, [output], initializers)
    opsets = [("", 18), (DOMAIN, OPSET_VERSION), ("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets], ir_version=9)


def _product(names: list[str], output: str, attributes: dict[str, int]) -> onnx.NodeProto:
    return helper.make_node(TERNARY_TILE_MATMUL.name, names, [output], domain=DOMAIN, **attributes)


Part = tuple[onnx.NodeProto, dict[str, np.ndarray], dict[str, int]]  # node, constants, inputs beside x


def _ours(attributes: dict[str, int], weight_NK: np.ndarray) -> Part:
    constants = {"packed": to_panels(weight_NK)[None], "row_scale": np.full((1, len(weight_NK)), SCALE, np.float32)}
    return _product(["x", "packed", "row_scale", "tile_idx"], "y", attributes), constants, {"tile_idx": TensorProto.INT64}


def stacked(node: onnx.NodeProto, constants: dict[str, np.ndarray], inputs: dict[str, int], depth: int) -> onnx.ModelProto:
    """Square products one after the other, each with constants of its own."""
    nodes, copies = [], {}
    for level in range(depth):
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        own = {name: f"{name}_{level}" for name in constants}
        own |= {"x": "x" if level == 0 else f"y_{level - 1}", "y": "y" if level + 1 == depth else f"y_{level}"}
        copied.input[:] = [own.get(name, name) for name in node.input]
        copied.output[:] = [own[name] for name in node.output]
        nodes.append(copied)
        copies |= {f"{name}_{level}": array.copy() for name, array in constants.items()}
    return graph_model(nodes, copies, inputs)


def layer(up_HD: np.ndarray, down_DH: np.ndarray, num_tiles: int) -> onnx.ModelProto:
    """The hidden values in tiles; of one tile nothing is chosen, the dense layer."""
    width = len(down_DH)
    signatures = np.random.default_rng(4).integers(-1, 2, (num_tiles, width), dtype=np.int8)
    constants = {
        "up": to_panels(up_HD.reshape(num_tiles, -1, width)),
        "up_scale": np.full((num_tiles, len(up_HD) // num_tiles), SCALE, np.float32),
        "down": to_panels(down_DH.reshape(width, num_tiles, -1).transpose(1, 0, 2)),
        "down_scale": np.full((num_tiles, width), SCALE, np.float32),
    }
    names = ["x", "choice", "weight", *constants]
    node = helper.make_node(TERNARY_FFN.name, names, ["y"], domain=DOMAIN, **OURS["trix 8 bit"])
    if num_tiles == 1:
        return graph_model([node], constants, {"choice": TensorProto.INT64, "weight": TensorProto.FLOAT})
    routing = {"signatures": to_panels(signatures), "none": np.zeros(num_tiles, np.float32)}
    return graph_model([_choice("choice"), node], constants | routing)


def route(signatures: np.ndarray) -> onnx.ModelProto:
    constants = {"signatures": to_panels(signatures), "none": np.zeros(len(signatures), np.float32)}
    return graph_model([_choice("y")], constants)


def _choice(output: str) -> onnx.NodeProto:
    """The best tile, with the gate that looks at it alone."""
    names = ["x", "signatures", "none", "none"]
    return helper.make_node(SIGNATURE_ROUTE.name, names, [output, "weight", ""], domain=DOMAIN, gate=0)


def argmax(table_KE: np.ndarray) -> onnx.ModelProto:
    nodes = [helper.make_node("MatMul", ["x", "table"], ["score"]), helper.make_node("ArgMax", ["score"], ["y"], axis=1)]
    return graph_model(nodes, {"table": table_KE})


def _matmul(weight_NK: np.ndarray) -> Part:
    weight_KN = np.ascontiguousarray(weight_NK.T * np.float32(SCALE), dtype=np.float32)
    return helper.make_node("MatMul", ["x", "weight"], ["y"]), {"weight": weight_KN}, {}


def _dynamic_int8(weight_NK: np.ndarray) -> Part:
    constants = {
        "weight": np.ascontiguousarray(weight_NK.T),
        "scale": np.array(SCALE, np.float32),
        "zero": np.array(0, np.int8),
    }
    return helper.make_node("DynamicQuantizeMatMul", ["x", *constants], ["y"], domain="com.microsoft"), constants, {}


def _nbits(bits: int, block: int, weight_NK: np.ndarray) -> Part:
    """Zero stands in the middle of the codes, as MatMulNBits has it without zero points."""
    num_rows, num_columns = weight_NK.shape
    codes = (weight_NK.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8).reshape(num_rows, num_columns // block, -1)
    fields = codes.reshape(*codes.shape[:-1], -1, 8 // bits)
    packed = (fields << (bits * np.arange(8 // bits, dtype=np.uint8))).sum(-1, dtype=np.uint8)
    constants = {"packed": packed, "scales": np.full(num_rows * num_columns // block, SCALE, np.float32)}
    attributes = {"K": num_columns, "N": num_rows, "bits": bits, "block_size": block, "accuracy_level": 4}
    return helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", **attributes), constants, {}


PRODUCTS: dict[str, Callable[[np.ndarray], Part]] = {name: partial(_ours, attributes) for name, attributes in OURS.items()} | {
    "ort float32": _matmul,
    "ort int8": _dynamic_int8,
    "ort 4 bit, 32": partial(_nbits, 4, 32),
    "ort 2 bit, 128": partial(_nbits, 2, 128),
}


def bind(made: ort.InferenceSession, x: np.ndarray) -> Run:
    """A run without copies: inputs and outputs stay where they are, as a host program would hold them."""
    column = (len(x), 1)
    feeds = {"x": x, "tile_idx": np.zeros(len(x), np.int64), "choice": np.zeros(column, np.int64)}
    feeds |= {"weight": np.ones(column, np.float32)}
    feeds = {value.name: feeds[value.name] for value in made.get_inputs()}
    names = [value.name for value in made.get_outputs()]
    outputs = [ort.OrtValue.ortvalue_from_numpy(array) for array in made.run(names, feeds)]
    binding = made.io_binding()
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
    for name, value in zip(names, outputs, strict=True):
        binding.bind_ortvalue_output(name, value)

    def run_bound() -> list[ort.OrtValue]:
        made.run_with_iobinding(binding)
        return outputs

    return run_bound
