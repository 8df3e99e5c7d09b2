"""Do the operators compute here what they should? Small models of each, against numpy. Needs no torch.

``python -m ort_ops.self_test`` prints one line for each path, "native" and "portable". A process of its own survives what it
finds: a kernel that the CPU cannot run ends the process, and which instruction set was chosen stands in its stderr alone.
"""

from collections.abc import Mapping, Sequence

import onnx
import onnxruntime
from onnx import TensorProto, helper

from ort_ops.graph_nodes import ONNX_OPSET
from ort_ops.library import LibraryNotFoundError, get_library_path, session_options
from ort_ops.operators import OPERATORS, fallback_functions
from ort_ops.operators.checks import Array
from ort_ops.schema import DOMAIN, OPSET_VERSION, OpSchema, TensorSchema

Arrays = Mapping[str, Array]

PATHS = ("native", "portable")
ISA_MESSAGE = "ai.trix: kernels run with instruction set "  # what the library logs, at level INFO, when it first computes
MAX_ERROR = 1e-5  # relative to the greatest value; sums of at most 67 float32 products
_INFO = 1
_ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}


def check(path: str) -> str:
    """Run the operators on random inputs: "ok: with what", "missing: why" (no library), or "wrong: why".

    Args:
        path: "native" uses the library's kernels, "portable" the operators' definition in standard ONNX operators.
    """
    try:
        run = _native if path == "native" else _portable
        errors = {operator.schema.name: operator.check(run) for operator in OPERATORS.values()}
    except LibraryNotFoundError as error:
        return f"missing: {error}"
    except Exception as error:  # onnxruntime's exceptions share no base class of their own
        return "wrong: " + " ".join(str(error).split())
    wrong = {op: error for op, error in errors.items() if not error <= MAX_ERROR}
    if wrong:
        found = (f"relative error of {op} ({error:.1e}) must be <= {MAX_ERROR:.0e}" for op, error in wrong.items())
        return f"wrong: {', '.join(found)}"
    return f"ok: {get_library_path()}" if path == "native" else "ok: standard ONNX operators"


def _native(op: OpSchema, feeds: Arrays, **attributes: float) -> Sequence[Array]:
    options = session_options(intra_op_num_threads=1)
    options.log_severity_level = _INFO
    return _run(_model(op, attributes), options, feeds)


def _portable(op: OpSchema, feeds: Arrays, **attributes: float) -> Sequence[Array]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = _model(op, attributes)
    model.functions.extend(fallback_functions())
    return _run(model, options, feeds)


def _model(op: OpSchema, attributes: Mapping[str, float]) -> onnx.ModelProto:
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
