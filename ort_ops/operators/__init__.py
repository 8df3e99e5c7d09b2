"""The operators of `ai.trix`, a file each: schema, definition in standard ONNX operators, check, translation from torch.

A model that carries `fallback_functions()` runs in any onnxruntime: with the native library registered its kernels
take precedence, without it the functions are inlined. They need opset 18 and ir_version 9 (onnxruntime 1.17).

Differences from the kernels: float sums have another order (results agree to rounding); nothing is validated: a
reserved code gives NaN, and a tile_idx outside [0, E) is not an error of ours; a NaN routing key counts as -inf.
x without columns (K = 0) needs a newer onnxruntime than 1.17, and SparseLookup, whose norm is onnxruntime's, at least two.
One infinite or NaN score makes all weights of its token NaN.

Importing this package loads onnx and numpy, no torch.
"""

from importlib import import_module

import onnx
from onnx import FunctionProto, helper

from ort_ops.operators.operator import Operator
from ort_ops.schema import DOMAIN, OPSET_VERSION, OpSchema, TensorSchema

# The one list on the Python side: the files of this folder that hold an operator, in the order of native/ops/ops.inc. A test
# compares the two. Names, not imports, so that an operator is one row.
FILES = (
    "ternary_tile_matmul",
    "ternary_matmul",
    "signature_route",
    "ternary_ffn",
    "sparse_lookup",
    "resolvent_sweep",
    "resolvent_mix",
)
OPERATORS: dict[str, Operator] = {file: import_module(f"{__name__}.{file}").OPERATOR for file in FILES}
SCHEMAS: tuple[OpSchema, ...] = tuple(operator.schema for operator in OPERATORS.values())


def fallback_functions() -> tuple[FunctionProto, ...]:
    """One model-local function per operator, to be appended to `model.functions`."""
    return tuple(operator.function() for operator in OPERATORS.values())


def register_schemas() -> None:
    """Tell onnx about the operators, so that the exporter and the checker know them. May be called repeatedly."""
    for op in SCHEMAS:
        if not onnx.defs.has(op.name, DOMAIN):
            onnx.defs.register_schema(_onnx_schema(op))


def _onnx_schema(op: OpSchema) -> onnx.defs.OpSchema:
    return onnx.defs.OpSchema(
        op.name,
        DOMAIN,
        OPSET_VERSION,
        doc=op.doc,
        inputs=[_parameter(tensor) for tensor in op.inputs],
        outputs=[_parameter(tensor) for tensor in op.outputs],
        attributes=[
            onnx.defs.OpSchema.Attribute(attribute.name, default_value=helper.make_attribute(attribute.name, attribute.default))
            for attribute in op.attributes
        ],
    )


def _parameter(tensor: TensorSchema) -> onnx.defs.OpSchema.FormalParameter:
    types = {"float32": "tensor(float)", "uint8": "tensor(uint8)", "int64": "tensor(int64)"}
    options = onnx.defs.OpSchema.FormalParameterOption
    option = options.Optional if tensor.is_optional else options.Single
    return onnx.defs.OpSchema.FormalParameter(tensor.name, types[tensor.element_type], param_option=option)
