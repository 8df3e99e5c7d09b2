"""What is changed in the graph that torch's exporter writes.

Inner graphs, as those of ``torch.cond``, stay as they are: what they read counts as read.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, helper, numpy_helper

from ort_ops.file_format import Activations
from ort_ops.operators import SCHEMAS, fallback_functions
from ort_ops.operators.signature_route import SIGMOID, SIGNATURE_ROUTE
from ort_ops.operators.sparse_lookup import SPARSE_LOOKUP
from ort_ops.schema import DOMAIN


def unsqueeze_constants(graph: GraphProto) -> None:
    """Give constants the axis that a node adds to them, as to a layer's only tile: torch's exporter folds small ones alone."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    made: dict[tuple[str, ...], str] = {}  # of a layer that is called twice, both calls read one constant
    replaced = {}
    outputs = {value.name for value in graph.output}
    for node in [node for node in graph.node if node.op_type == "Unsqueeze" and constants.keys() >= set(node.input)]:
        output = node.output[0]
        first = made.get(tuple(node.input))
        if first is None or output in outputs:
            source, axes = (numpy_helper.to_array(constants[name]) for name in node.input)
            graph.initializer.append(numpy_helper.from_array(np.expand_dims(source, tuple(axes)), output))
            made[tuple(node.input)] = output
        else:
            replaced[output] = first
        graph.node.remove(node)
    _read_instead(graph, replaced)
    num_reads = _num_reads(graph)
    for tensor in [tensor for tensor in graph.initializer if not num_reads[tensor.name]]:
        graph.initializer.remove(tensor)


def divide_by_roots(graph: GraphProto) -> None:
    """x * (1 / sqrt(v)) as x / sqrt(v): so written, onnxruntime takes an RMS norm for one operator, not seven."""
    num_reads = _num_reads(graph)
    roots = {node.output[0] for node in graph.node if node.op_type == "Sqrt"}
    products = {name: node for node in graph.node if node.op_type == "Mul" for name in node.input}
    for inverse in [node for node in graph.node if node.op_type == "Reciprocal" and node.input[0] in roots]:
        product = products.get(inverse.output[0])
        if product is None or num_reads[inverse.output[0]] != 1:
            continue
        factor = next(name for name in product.input if name != inverse.output[0])
        product.CopyFrom(helper.make_node("Div", [factor, inverse.input[0]], product.output, name=product.name))
        graph.node.remove(inverse)


def join_reshapes(graph: GraphProto) -> None:
    """Let a reshape of what another one gives read the value before both; the other goes if nothing else reads it."""
    before = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Reshape"}
    for node in graph.node:
        # With allowzero 0 a size of 0 would stand for that of the value it reads.
        takes_zero = any(attribute.name == "allowzero" and attribute.i == 1 for attribute in node.attribute)
        while node.op_type == "Reshape" and takes_zero and node.input[0] in before:
            node.input[0] = before[node.input[0]]
    num_reads = _num_reads(graph)
    for node in reversed([node for node in graph.node if node.output[0] in before]):
        if num_reads[node.output[0]] == 0:
            num_reads.subtract(node.input)
            graph.node.remove(node)


def share_constants(graph: GraphProto) -> None:
    """Keep one of equal constants, as each layer has of its positions, so that onnxruntime computes once what it makes of them.

    Those that our operators read stay each layer's own: they are what is edited. So does a constant that is an output.
    """
    own = {name for node in graph.node if node.domain == DOMAIN for name in node.input} | {v.name for v in graph.output}
    own |= {name for inner in list(all_graphs(graph))[1:] for node in inner.node for name in node.input}
    kept: dict[tuple[int, tuple[int, ...], bytes], str] = {}
    replaced = {}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in own]:
        content = numpy_helper.to_array(tensor)
        first = kept.setdefault((tensor.data_type, content.shape, content.tobytes()), tensor.name)
        if first != tensor.name:
            replaced[tensor.name] = first
            graph.initializer.remove(tensor)
    _read_instead(graph, replaced)


def leave_out_unread(graph: GraphProto) -> None:
    """Take the names of optional outputs that nothing reads from our operators, which then do not hand them over.

    The empty name stays: onnxruntime 1.17 to 1.31 fail on a function with more outputs than the node that it replaces.
    """
    num_reads = _num_reads(graph)
    ops = {op.name: op for op in SCHEMAS}
    for node in graph.node:
        if node.domain == DOMAIN:
            for place, (name, tensor) in enumerate(zip(node.output, ops[node.op_type].outputs, strict=False)):
                if tensor.is_optional and not num_reads[name]:
                    node.output[place] = ""


def join_routes(graph: GraphProto) -> None:
    """One SignatureRoute in place of several in a row that read the same x with equal attributes and sizes, as those of all
    layers do with ``route_on: context`` or ``embedding``: x is quantised once, and all choices are known before the first
    layer runs.

    The constants stay each layer's own: they are what is edited. A Concat joins them, which onnxruntime computes once, when it
    loads the file; a Split separates the choices. Nodes whose scores are read stay as they are, and so do those of hierarchical
    layers: only a node of its own scores many tiles in 8 bits first.
    """
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    names = (SIGNATURE_ROUTE.name, SPARSE_LOOKUP.name)
    nodes = [node for node in graph.node if node.domain == DOMAIN and node.op_type in names]
    for _, equal in groupby(nodes, lambda node: _join_key(node, sizes)):
        _join(graph, list(equal))


def _join_key(node: NodeProto, sizes: Mapping[str, tuple[int, ...]]) -> tuple[Any, ...]:
    """Equal for nodes that can be joined, and unique for every other node."""
    x, *constants = node.input
    is_sigmoid = any(attribute.name == "gate" and attribute.i == SIGMOID for attribute in node.attribute)
    if node.op_type != SIGNATURE_ROUTE.name or is_sigmoid or any(node.output[2:]) or not sizes.keys() >= set(constants):
        return (node.output[0],)
    attributes = sorted(attribute.SerializeToString() for attribute in node.attribute)
    return (x, *(sizes[name] for name in constants), *attributes)


def _join(graph: GraphProto, routes: Sequence[NodeProto]) -> None:
    if len(routes) == 1:
        return
    first, count = routes[0], len(routes)
    joined = [f"{first.output[0]}.{tensor.name}" for tensor in SIGNATURE_ROUTE.inputs[1:]]
    concats = [
        helper.make_node("Concat", [route.input[place] for route in routes], [name], name=name, axis=0)
        for place, name in enumerate(joined, start=1)
    ]
    chosen = [f"{name}.of_all" for name in first.output[:2]]
    inputs, outputs = [first.input[0], *joined], [*chosen, ""]
    whole = helper.make_node(first.op_type, inputs, outputs, name=first.name, domain=DOMAIN, num_groups=count)
    whole.attribute.extend(attribute for attribute in first.attribute if attribute.name != "num_groups")
    splits = [
        helper.make_node("Split", [name], [route.output[place] for route in routes], name=name, axis=1, num_outputs=count)
        for place, name in enumerate(chosen)
    ]
    nodes = list(graph.node)
    place = nodes.index(first)
    rest = [node for node in nodes[place:] if node not in routes]
    del graph.node[place:]
    graph.node.extend([*concats, whole, *splits, *rest])


def set_activations(graph: GraphProto, activations: Activations) -> None:
    """Set them in every node that takes them: routing nodes do not, and the products of a BitLinear keep their own."""
    names = {op.name for op in SCHEMAS if any(attribute.name == "activation_bits" for attribute in op.attributes)}
    for node in (node for inner in all_graphs(graph) for node in inner.node):
        has_own = any(attribute.name == "min_magnitude" and attribute.f > 0 for attribute in node.attribute)
        if node.domain == DOMAIN and node.op_type in names and not has_own:
            values = {"activation_bits": activations.bits, "group_size": activations.group_size}
            kept = [attribute for attribute in node.attribute if attribute.name not in values]
            del node.attribute[:]
            node.attribute.extend([*kept, *(helper.make_attribute(*pair) for pair in values.items())])


def missing_functions(model: ModelProto) -> list[FunctionProto]:
    """The portable definitions of our operators that the model uses, and of those that these use in turn."""
    definitions = {function.name: function for function in fallback_functions()}
    nodes = [node for graph in all_graphs(model.graph) for node in graph.node]
    nodes += [node for function in model.functions for node in function.node]
    used: set[str] = set()
    while nodes:
        node = nodes.pop()
        if node.domain == DOMAIN and node.op_type not in used:
            used.add(node.op_type)
            nodes.extend(definitions[node.op_type].node)
    return [function for name, function in definitions.items() if name in used]


def all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """The graph, and those in the attributes of its nodes."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from all_graphs(inner)


def names_read(graph: GraphProto) -> Iterator[str]:
    """Every value that a node or an output of the graph reads, or of a graph in it, as often as it is read."""
    for inner in all_graphs(graph):
        yield from (value.name for value in inner.output)
        for node in inner.node:
            yield from node.input


def _num_reads(graph: GraphProto) -> Counter[str]:
    """How often nodes and outputs of the graph read a value."""
    return Counter(names_read(graph))


def _read_instead(graph: GraphProto, replaced: Mapping[str, str]) -> None:
    """Let all nodes read another value in place of some."""
    for inner in all_graphs(graph):
        for node in inner.node:
            for place, name in enumerate(node.input):
                if name in replaced:
                    node.input[place] = replaced[name]
