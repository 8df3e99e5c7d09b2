"""From a packed module to an ONNX graph with the operators of :mod:`ort_ops.schema`, by torch's exporter."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import onnx
import torch
from torch import nn

from ort_ops.graph import (
    all_graphs,
    divide_by_roots,
    join_reshapes,
    join_routes,
    leave_out_unread,
    names_read,
    share_constants,
    unsqueeze_constants,
)
from ort_ops.graph_nodes import ONNX_OPSET
from ort_ops.operators import SCHEMAS
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN
from ort_ops.translation import make_table
from ort_ops.verification import ExportError
from trix.functional.packing import CODES_PER_BYTE, unpack_ternary

ONNX_IR_VERSION = 9  # the newest that onnxruntime 1.17 reads
MAX_CAUSE = 400  # characters of torch's own message


class Interface(NamedTuple):
    """What is traced: the wrapper of the packed module, example inputs with their dynamic axes, names of inputs and outputs."""

    wrapper: Callable[[Any], nn.Module]
    examples: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...] | None
    input_names: list[str] | None
    output_names: list[str] | None


class Traced(NamedTuple):
    """The finished graph: weights in panels, without paths. The packed module in its wrapper. Torch's own program."""

    proto: onnx.ModelProto
    wrapped: nn.Module
    program: torch.export.ExportedProgram


def trace(packed: nn.Module, interface: Interface) -> Traced:
    """The module as an ONNX model.

    Raises:
        ExportError: torch's exporter cannot trace or translate the module; with its first cause.
    """
    wrapped = interface.wrapper(packed).eval()
    with torch.no_grad(), _quiet():
        try:
            program = torch.onnx.export(
                wrapped,
                interface.examples,
                input_names=interface.input_names,
                output_names=interface.output_names,
                dynamic_shapes=interface.dynamic_shapes,
                opset_version=ONNX_OPSET,
                custom_translation_table=make_table(lambda rows: rows),
                verbose=False,
            )
        except Exception as error:  # whatever the exporter, or the module's forward under it, raises
            raise ExportError(f"{type(packed).__name__} can't be exported: {first_cause(error)}") from error
    assert program is not None
    assert program.exported_program is not None
    proto = program.model_proto
    unsqueeze_constants(proto.graph)
    divide_by_roots(proto.graph)
    join_reshapes(proto.graph)
    share_constants(proto.graph)
    leave_out_unread(proto.graph)
    _lay_in_panels(proto.graph)
    join_routes(proto.graph)
    proto.ir_version = ONNX_IR_VERSION
    proto.producer_name = "trix"
    # The exporter notes the source line of every node, with the paths of this machine: two thirds of a small file.
    for graph in all_graphs(proto.graph):
        del graph.value_info[:]
        for node in graph.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
    return Traced(proto, wrapped, program.exported_program)


def outputs_of_inputs(graph: onnx.GraphProto) -> list[int]:
    """The places of the outputs that depend on an input."""
    reached = {value.name for value in graph.input}
    for node in graph.node:
        bodies = [body for attribute in node.attribute for body in (attribute.g, *attribute.graphs)]
        if not reached.isdisjoint((*node.input, *(name for body in bodies for name in names_read(body)))):
            reached.update(name for name in node.output if name)
    return [place for place, value in enumerate(graph.output) if value.name in reached]


def name_values(graph: onnx.GraphProto, input_names: list[str], kept: list[int], output_names: list[str]) -> None:
    """Name inputs, and those outputs that are kept; another value of such a name gets a new one."""
    outputs = [graph.output[place] for place in kept]
    wanted = dict(zip([value.name for value in (*graph.input, *outputs)], [*input_names, *output_names], strict=True))
    del graph.output[:]
    graph.output.extend(outputs)
    graphs = list(all_graphs(graph))
    taken = {name for inner in graphs for node in inner.node for name in (*node.input, *node.output)} | set(wanted.values())
    taken |= {value.name for inner in graphs for value in (*inner.initializer, *inner.input)}
    for name in sorted((taken & set(wanted.values())) - wanted.keys()):
        wanted[name] = next(new for place in range(len(taken) + 1) if (new := f"{name}.{place}") not in taken)
        taken.add(wanted[name])
    for inner in graphs:
        for value in (*inner.input, *inner.output, *inner.initializer, *inner.value_info):
            value.name = wanted.get(value.name, value.name)
        for node in inner.node:
            node.input[:] = [wanted.get(name, name) for name in node.input]
            node.output[:] = [wanted.get(name, name) for name in node.output]


def first_cause(error: BaseException) -> str:
    """What the exporter's long report comes from, in one line: type and message, without its stack and hints for debugging."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = []
    for line in map(str.strip, str(error).splitlines()):
        if line.startswith(("Caused by", "The following call", "from user code", "(Size-like")):
            break
        if line and not line.startswith(("For ", "If you suspect", "See ")):
            lines.append(line)
    text = " ".join(lines)
    text = text if len(text) <= MAX_CAUSE else f"{text[:MAX_CAUSE]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _lay_in_panels(graph: onnx.GraphProto) -> None:
    """Replace packed rows, as torch holds them, by the panels that the operators take. 00 in a row's padding is a zero."""
    initializers = {tensor.name: tensor for inner in all_graphs(graph) for tensor in inner.initializer}
    places = {op.name: [i for i, tensor in enumerate(op.inputs) if tensor.element_type == "uint8"] for op in SCHEMAS}
    nodes = [node for inner in all_graphs(graph) for node in inner.node if node.domain == DOMAIN]
    for name in {node.input[place] for node in nodes for place in places[node.op_type]}:
        if name not in initializers:
            raise ExportError(f"packed weight {name} must be a constant of the graph, not computed from inputs")
        rows = torch.from_numpy(onnx.numpy_helper.to_array(initializers[name]).copy())
        ternary = unpack_ternary(rows, rows.shape[-1] * CODES_PER_BYTE).numpy()
        initializers[name].CopyFrom(onnx.numpy_helper.from_array(to_panels(ternary), name))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings of packages that this project does not use, and what it prints when it fails."""
    loggers = [
        logging.getLogger(name) for name in ("torch.onnx", "torch.fx.experimental.symbolic_shapes", "onnx_ir", "onnxscript")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
