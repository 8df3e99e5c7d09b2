"""What the bodies of the portable functions are made of: nodes, constants, and the function around them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, NodeProto, TensorProto, helper, numpy_helper

from ort_ops.schema import DOMAIN, OPSET_VERSION, OpSchema

ONNX_OPSET = 18


def float_info(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, None])


def int_vector(output: str, values: Sequence[int]) -> NodeProto:
    """A constant int64 vector. As a tensor: the shape inference of onnxruntime 1.17 misreads `value_ints`."""
    return node("Constant", [], [output], value=numpy_helper.from_array(np.array(values, dtype=np.int64), output))


def attribute_value(attribute: str, output: str, kind: AttributeProto.AttributeType = AttributeProto.INT) -> NodeProto:
    """A constant that takes its value from an attribute of the function, an integer or (kind FLOAT) a float."""
    constant = node("Constant", [], [output])
    name = "value_float" if kind == AttributeProto.FLOAT else "value_int"
    constant.attribute.append(AttributeProto(name=name, type=kind, ref_attr_name=attribute))
    return constant


def attribute_reference(attribute: str, kind: AttributeProto.AttributeType) -> AttributeProto:
    """An attribute of a node that takes its value from that of the same name of the function."""
    return AttributeProto(name=attribute, type=kind, ref_attr_name=attribute)


def node(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    return helper.make_node(op_type, inputs, outputs, **attributes)


def as_function(op: OpSchema, nodes: Sequence[NodeProto]) -> FunctionProto:
    return helper.make_function(
        DOMAIN,
        op.name,
        [tensor.name for tensor in op.inputs],
        [tensor.name for tensor in op.outputs],
        nodes,
        [helper.make_opsetid("", ONNX_OPSET), helper.make_opsetid(DOMAIN, OPSET_VERSION)],
        attributes=[],
        attribute_protos=[helper.make_attribute(attribute.name, attribute.default) for attribute in op.attributes],
        doc_string=op.doc,
    )
