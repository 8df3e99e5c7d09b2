"""What the bodies of the portable functions are made of: nodes, constants, and the function around them."""

from collections.abc import Mapping, Sequence
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


def scan_tokens(
    step: Sequence[NodeProto],
    states: Sequence[tuple[str, str, str, str]],
    read: Sequence[tuple[str, str]],
    written: Sequence[tuple[str, str]],
    without_tokens: Mapping[str, str],
    state_rank: int,
    written_rank: int,
) -> list[NodeProto]:
    """A Scan along axis 2, the tokens, of tensors of floats.

    step: the nodes of one step. states: the name before the first step, then in a step before and after it, and after the last
    step. read: what is cut along the axis, outside and in a step. written: what is joined, in a step and outside.
    without_tokens: which of the inputs each output is where one of `read` is empty, at which onnxruntime's Scan crashes.
    The ranks are those in a step, without which onnxruntime runs no Scan; it finds them itself only where it knows the inputs'.
    """
    body = helper.make_graph(
        step,
        "step",
        [*(_floats(state[1], state_rank) for state in states), *(_floats(inner) for _, inner in read)],
        [*(_floats(state[2], state_rank) for state in states), *(_floats(inner, written_rank) for inner, _ in written)],
    )
    outputs = [*(state[3] for state in states), *(outer for _, outer in written)]
    scan = node(
        "Scan",
        [*(state[0] for state in states), *(outer for outer, _ in read)],
        [f"{name}_of_tokens" for name in outputs],
        body=body,
        num_scan_inputs=len(read),
        scan_input_axes=[2] * len(read),
        scan_output_axes=[2] * len(written),
    )
    copies = [node("Identity", [without_tokens[name]], [f"{name}_of_none"]) for name in outputs]
    with_tokens, empty = (
        helper.make_graph(nodes, ending, [], [_floats(f"{name}_{ending}") for name in outputs])
        for nodes, ending in (([scan], "of_tokens"), (copies, "of_none"))
    )
    return [
        *(node("Size", [outer], [f"size_of_{outer}"]) for outer, _ in read),
        node("Min", [f"size_of_{outer}" for outer, _ in read], ["smallest_size"]),
        node("Cast", ["smallest_size"], ["has_tokens"], to=TensorProto.BOOL),
        node("If", ["has_tokens"], outputs, then_branch=with_tokens, else_branch=empty),
    ]


def _floats(name: str, rank: int | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None if rank is None else [None] * rank)
