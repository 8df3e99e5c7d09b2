"""The layers of an exported file that are routed by signatures: their constants, read from the graph and changed in it.

Needs onnx and numpy. Legend: D model width, E tiles, K tiles per token, T tokens.
"""

import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx.inliner
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ort_ops.external_data import check_external_data
from ort_ops.external_weights import load
from ort_ops.file_format import DECODER, MAX_AXIS, MAX_FILE_BYTES, MODULE, FileRecord, LayerRecord, ModelFileError
from ort_ops.graph import names_read
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.sparse_lookup import SPARSE_LOOKUP, sparse_lookup_function
from ort_ops.panels import RESERVED_VALUE, from_panels, to_panels
from ort_ops.schema import DOMAIN
from trix.regular_files import read_regular

# Of the operators that route by signatures: where each input stands.
_PLACES = {op.name: {tensor.name: i for i, tensor in enumerate(op.inputs)} for op in (SIGNATURE_ROUTE, SPARSE_LOOKUP)}
_SCORE = 2  # an output of SignatureRoute


class LayerNodes(NamedTuple):
    """What routes one layer.

    node: its SignatureRoute, which it may share with other layers, or its SparseLookup. companions: the SignatureRoute, if any,
    that computes the scores of a sparse lookup from the same constants. readers: for each input of the node that is a constant
    of the layer, the node that reads it and the place among its inputs: the node itself, or a Concat that joins the constants
    of all layers.
    """

    node: NodeProto
    companions: tuple[NodeProto, ...]
    readers: dict[str, tuple[NodeProto, int]]

    @property
    def constants(self) -> set[str]:
        """The names of the layer's own constants."""
        return {reader.input[place] for reader, place in self.readers.values()}


class SignatureLayer:
    """A layer that a SignatureRoute or SparseLookup routes, and its constants in the graph: a change is written there at once.

    Attributes:
        signature_ED: int8 in {-1, 0, +1}. bias_E: float32, -inf in a free slot. log_mass_E: float32, not 0 where a merger or a
            split left its mark in the gate of a SignatureRoute. top_k: tiles per token. changed: the names of the initializers
            that were changed or added. places: where they are read, as the first output of a node and the place among its
            inputs.

    An initializer that other nodes read too, as equal ones may have been joined at the export, stays as it is: the layer gets
    its own.
    """

    def __init__(self, graph: GraphProto, nodes: LayerNodes, d_model: int) -> None:
        self._graph, self._companions, self._readers = graph, nodes.companions, nodes.readers
        self.changed: list[str] = []
        self.places: set[tuple[str, int]] = set()
        self.top_k = _int_attribute(nodes.node, "top_k")
        self.bias_E = self._constant("bias")
        self.log_mass_E = self._constant("log_mass") if "log_mass" in self._readers else np.zeros_like(self.bias_E)
        is_vector = all(values.ndim == 1 and values.dtype == np.float32 for values in (self.bias_E, self.log_mass_E))
        if not is_vector or self.bias_E.shape != self.log_mass_E.shape:
            shapes = f"{self.bias_E.dtype} {self.bias_E.shape} and {self.log_mass_E.dtype} {self.log_mass_E.shape}"
            raise ValueError(f"bias and log_mass ({shapes}) must be float32, one value a tile")
        if np.isnan(self.bias_E).any() or np.isposinf(self.bias_E).any() or not np.isfinite(self.log_mass_E).all():
            raise ValueError("bias and log_mass must be finite, except for a bias of -inf in a free slot")
        if not 1 <= self.top_k <= len(self.bias_E):
            raise ValueError(f"top_k ({self.top_k}) must be >= 1 and <= tiles ({len(self.bias_E)})")
        panels = self._constant("signatures")
        if panels.ndim != 3 or panels.dtype != np.uint8:
            raise ValueError(f"packed signatures ({panels.dtype}, {panels.ndim} axes) must be uint8 of 3 axes")
        self.signature_ED = from_panels(panels, len(self.bias_E), d_model)
        if (self.signature_ED == RESERVED_VALUE).any():
            raise ValueError("packed codes must be 0, 1 or 2, there is a 3")

    @property
    def is_free_E(self) -> NDArray[np.bool_]:  # noqa: N802
        return np.isneginf(self.bias_E)

    def set_signature(self, tile_idx: int, signature_D: NDArray[np.int8]) -> None:
        self.signature_ED = self.signature_ED.copy()
        self.signature_ED[tile_idx] = signature_D
        self._set_constant("signatures", to_panels(self.signature_ED))

    def set_bias(self, tile_idx: int, bias: float) -> None:
        """-inf frees the slot, another value lets it be chosen; its mass is 1 either way."""
        self.bias_E = self.bias_E.copy()
        self.bias_E[tile_idx] = bias
        self._set_constant("bias", self.bias_E)
        if self.log_mass_E[tile_idx] != 0:
            self.log_mass_E = self.log_mass_E.copy()
            self.log_mass_E[tile_idx] = 0.0
            self._set_constant("log_mass", self.log_mass_E)

    def _constant(self, of_input: str) -> NDArray[Any]:
        node, place = self._readers[of_input]
        found = next((tensor for tensor in self._graph.initializer if tensor.name == node.input[place]), None)
        if found is None:
            raise ValueError(f"input {place} of node {node.name} ({node.op_type}) must be a constant of the graph")
        if found.data_location != TensorProto.DEFAULT:
            raise ValueError(f"constant {found.name} must be stored in the file, not in another one")
        return numpy_helper.to_array(found)

    def _set_constant(self, of_input: str, value: NDArray[Any]) -> None:
        node, place = self._readers[of_input]
        name = node.input[place]
        reads = [
            (node, place),
            *((other, i) for other in self._companions for i, used in enumerate(other.input) if used == name),
        ]
        if sum(1 for used in names_read(self._graph) if used == name) > len(reads):
            taken = {tensor.name for tensor in self._graph.initializer} | {out for n in self._graph.node for out in n.output}
            own = next(new for i in range(len(taken) + 1) if (new := f"{name}.{i}") not in taken)
            self._graph.initializer.append(numpy_helper.from_array(value, own))
            for reader, i in reads:
                reader.input[i] = own
            name = own
        else:
            tensor = next(tensor for tensor in self._graph.initializer if tensor.name == name)
            tensor.CopyFrom(numpy_helper.from_array(value, name))
        self.places |= {(reader.output[0], i) for reader, i in reads}
        if name not in self.changed:
            self.changed.append(name)


def read_model(path: Path) -> tuple[ModelProto, FileRecord, list[SignatureLayer], list[LayerRecord]]:
    """An exported file: graph, metadata, the layers that signatures route, in order, and what the metadata says of them.

    The last are those of the metadata, or empty ones where the file is of before there were records. Large weights in external
    data stay there, except those that route.

    Raises:
        ModelFileError: it cannot be read, or is no file of `trix export`.
    """
    try:
        content = read_regular(path, MAX_FILE_BYTES)
        check_external_data(path)
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ModelFileError(f"{path}: {error}") from error
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's exceptions are private to it
        raise ModelFileError(f"{path}: not an ONNX file, or a damaged one") from error
    try:
        _check_names(proto)
        about = FileRecord.from_properties({entry.key: entry.value for entry in proto.metadata_props})
        if about.task == DECODER:
            raise ValueError(
                f"task ({DECODER}) must be that of a file of `trix export`; `trix generate` runs the folder of this one"
            )
        nodes = signature_nodes(proto.graph)
        load(proto, path.parent, {name for of_layer in nodes for name in of_layer.constants})
        if about.layers is None:
            about.layers = [LayerRecord() for _ in nodes]
        if len(about.layers) != len(nodes):
            rule = f"must be a list of {len(nodes)} layers routed by signatures"
            raise ValueError(f"metadata layers ({len(about.layers)} records) {rule}")
        width = None if about.task == MODULE else _d_model(about)
        layers: list[SignatureLayer] = []
        for of_layer, record in zip(nodes, about.layers, strict=True):
            d_model = width if record.d_model is None else record.d_model
            if d_model is None:
                raise ValueError(f"metadata d_model of layer {len(layers)} (None) must be the width of its signatures")
            layers.append(SignatureLayer(proto.graph, of_layer, d_model))
            _check_record(record, len(layers[-1].bias_E))
        return proto, about, layers, about.layers
    except Exception as error:  # numpy's for constants that are none depend on their bytes
        raise ModelFileError(f"{path}: {' '.join(str(error).split())}") from error


def _check_names(proto: ModelProto) -> None:
    """protobuf gives bytes for a text that is not UTF-8."""
    names = [function.name for function in proto.functions] + [tensor.name for tensor in proto.graph.initializer]
    for node in proto.graph.node:
        names += [node.name, node.op_type, node.domain, *node.input, *node.output]
    odd = next((name for name in names if not isinstance(name, str)), None)
    if odd is not None:
        raise ValueError(f"name in the graph ({odd!r:.40}) must be UTF-8")


def _check_record(record: LayerRecord, num_tiles: int) -> None:
    if not all(0 <= tile < num_tiles for tile in record.frozen):
        raise ValueError(
            f"frozen tiles in the metadata of a layer ({record.frozen!r:.40}) must be >= 0 and < tiles ({num_tiles})"
        )
    if record.claims is not None and len(record.claims) != num_tiles:
        raise ValueError(f"claims in the metadata of a layer ({len(record.claims)}) must be as many as tiles ({num_tiles})")


def signature_nodes(graph: GraphProto) -> list[LayerNodes]:
    """The nodes of each layer that signatures route, in the order of computation.

    Raises:
        ValueError: a SignatureRoute has more groups than there are constants that a Concat joins for it, or fewer.
    """
    nodes = [node for node in graph.node if node.domain == DOMAIN and node.op_type in _PLACES]
    source_of_norm = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    lookups = {
        _routes_by(node, node.input[place]): node for node in nodes if node.op_type == SPARSE_LOOKUP.name for place in (0, 1)
    }
    companions: dict[str, NodeProto] = {}
    for node in nodes:
        if node.op_type == SIGNATURE_ROUTE.name and node.input[2] == node.input[3]:  # no mass of its own
            x = node.input[0]
            found = [
                lookups[key] for key in (_routes_by(node, x), _routes_by(node, source_of_norm.get(x, x))) if key in lookups
            ]
            companions |= {lookup.output[0]: node for lookup in found}
    own = [node for node in nodes if not any(node is companion for companion in companions.values())]
    return [nodes for node in own for nodes in _layers_of(graph, node, companions.get(node.output[0]))]


def _layers_of(graph: GraphProto, node: NodeProto, companion: NodeProto | None) -> list[LayerNodes]:
    """The layers that one node routes."""
    own = {name: place for name, place in _PLACES[node.op_type].items() if name in ("signatures", "bias", "log_mass")}
    groups = num_groups(node)
    if groups == 1:
        readers = {name: (node, place) for name, place in own.items()}
        return [LayerNodes(node, () if companion is None else (companion,), readers)]
    concats = {other.output[0]: other for other in graph.node if other.op_type == "Concat" and len(other.output) == 1}
    joined = {name: concats.get(node.input[place]) for name, place in own.items()}
    for name, concat in joined.items():
        count = 0 if concat is None else len(concat.input)
        if count != groups:
            rule = f"must be the number of {name} constants that a Concat joins ({count})"
            raise ValueError(f"num_groups ({groups}) of node {node.name} {rule}")
    return [
        LayerNodes(node, (), {name: (concat, group) for name, concat in joined.items() if concat is not None})
        for group in range(groups)
    ]


def num_groups(node: NodeProto) -> int:
    """How many layers a SignatureRoute or SparseLookup routes."""
    return _int_attribute(node, "num_groups")


def _int_attribute(node: NodeProto, name: str) -> int:
    """Its value; 1, which is the default of those asked for, where the node has none."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 1)


def _routes_by(node: NodeProto, x: str) -> tuple[str, str, str]:
    """What a layer is told by: what it reads, signatures and bias."""
    places = _PLACES[node.op_type]
    return x, node.input[places["signatures"]], node.input[places["bias"]]


def show_scores(nodes: Sequence[NodeProto]) -> list[str]:
    """Let SignatureRoute nodes hand over their scores, also where the file leaves them out: their names, in order."""
    for node in nodes:
        node.output.extend([""] * (_SCORE + 1 - len(node.output)))
        node.output[_SCORE] = node.output[_SCORE] or f"{node.output[0]}.score"
    return [node.output[_SCORE] for node in nodes]


def with_open_lookups(proto: ModelProto) -> ModelProto:
    """A copy in which every SparseLookup is its definition: what its SignatureRoute reads and answers has names there."""
    opened = copy.deepcopy(proto)
    kept = [function for function in opened.functions if function.name != SPARSE_LOOKUP.name]
    del opened.functions[:]
    opened.functions.extend([*kept, sparse_lookup_function()])
    return onnx.inliner.inline_selected_functions(opened, [(DOMAIN, SPARSE_LOOKUP.name)])


def _d_model(about: FileRecord) -> int:
    d_model = None if about.config is None else about.config.get("d_model")
    if type(d_model) is not int or not 1 <= d_model <= MAX_AXIS:
        raise ValueError(f"metadata config.d_model ({d_model!r:.40}) must be an integer >= 1 and <= {MAX_AXIS}")
    return d_model


def operator_counts(proto: ModelProto) -> Counter[str]:
    """How many nodes of each operator, with its domain where it is not ONNX's own."""
    return Counter(f"{node.domain}.{node.op_type}".lstrip(".") for node in proto.graph.node)
