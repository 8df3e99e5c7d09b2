"""Surgery on an exported file: one signature inserted, frozen or unfrozen, or one tile removed, into a new file.

The graph holds the signatures as constants, so that the file itself can be edited, without torch: a signature, and the bias and
the mass of its tile change, and nothing else. Frozen flags and the history stand in the metadata. The new file is verified
before it gets its name. Legend: D model width, E tiles, K tiles per token, T tokens.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto

from ort_ops.external_data import data_path, remove_old_data
from ort_ops.external_weights import data_digest, digests, is_external, move_out, session_of, set_location
from ort_ops.file_format import MODULE, FileRecord, LayerRecord, ModelFileError
from ort_ops.library import LibraryNotFoundError, session_options
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.parity import SCORE_ROUNDING, selection_gap
from ort_ops.reference import LogitsReference, ModuleReference
from ort_ops.runtime import open_model
from ort_ops.schema import DOMAIN
from ort_ops.signature_layers import (
    SignatureLayer,
    num_groups,
    read_model,
    show_scores,
    signature_nodes,
    with_open_lookups,
)
from ort_ops.state import empty_state
from trix.whole_file import whole_file, whole_files


class VerificationError(RuntimeError):
    """The edited file does not compute what it should; it was not written."""


@dataclass(frozen=True)
class Edit:
    """What to do: ``insert`` (needs signature_D, numbers [D] in {-1, 0, +1}), ``freeze``, ``unfreeze`` or ``remove``.

    freeze: whether an insertion holds the signature, so that a training from this file's history would not move it.
    """

    action: str
    layer: int
    tile_idx: int
    tag: str
    signature_D: NDArray[Any] | None = None
    freeze: bool = True


@dataclass(frozen=True)
class SurgeryReport:
    """before_D, after_D: the tile's signature. changed: names of the initializers that changed. num_rerouted: tokens, out of
    num_tokens of the reference example, that go to other tiles than before at the edited layer.
    """

    before_D: NDArray[np.int8]
    after_D: NDArray[np.int8]
    was_frozen: bool
    is_frozen: bool
    changed: list[str]
    num_equal: int
    num_rerouted: int
    num_tokens: int


def operate_on_file(source: Path, output: Path, edit: Edit) -> SurgeryReport:
    """Write the edited file, whole or not at all; where the source has external data, with a data file of its own.

    Verified on it: it loads; signature, history and flags read back; all other nodes, constants and functions are byte-equal;
    on the reference example the routing is what numpy computes from the constants, the other tiles' scores at the layer are as
    they were, no token changes its tiles but to or from the edited tile, and the output is finite.

    Scores that are an output of the file show -inf for the slots that were free at the export.

    Raises:
        ModelFileError: source is no exported file. ValueError: the edit does not fit it. VerificationError: see there.
    """
    proto, about, layers, records = read_model(source)
    layer = routed_layer(source, layers, edit.layer)
    old, record = copy.deepcopy(proto), records[edit.layer]
    before_D, was_frozen = _signature(source, layer, edit), edit.tile_idx in record.frozen
    try:
        _apply(layer, record, edit)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    example = _example(source, about)
    was, now = _Run(old, source.parent, example), _Run(proto, source.parent, example)
    num_rerouted = _check_routing(was, now, layers, edit)
    about.reference = now.as_reference(layers)
    onnx.helper.set_model_props(proto, about.to_properties())
    _write(proto, output, old=old, folder=source.parent, layer=layer, record=record, edit=edit)
    return SurgeryReport(
        before_D=before_D,
        after_D=layer.signature_ED[edit.tile_idx],
        was_frozen=was_frozen,
        is_frozen=edit.tile_idx in record.frozen,
        changed=layer.changed,
        num_equal=len({tensor.name for tensor in old.graph.initializer} - set(layer.changed)),
        num_rerouted=num_rerouted,
        num_tokens=now.tile_idx[edit.layer].shape[0],
    )


def routed_layer(source: Path, layers: Sequence[SignatureLayer], index: int) -> SignatureLayer:
    """The layer of a file; raises ValueError where it has none of that number."""
    if not layers:
        raise ValueError(f"{source}: number of layers routed by signatures in the file (0) must be >= 1")
    if not 0 <= index < len(layers):
        raise ValueError(f"{source}: layer ({index}) must be >= 0 and < number of routed layers ({len(layers)})")
    return layers[index]


def _signature(source: Path, layer: SignatureLayer, edit: Edit) -> NDArray[np.int8]:
    num_tiles = len(layer.signature_ED)
    if not 0 <= edit.tile_idx < num_tiles:
        raise ValueError(f"{source}: tile_idx ({edit.tile_idx}) must be >= 0 and < num_tiles ({num_tiles})")
    return layer.signature_ED[edit.tile_idx]


def _example(source: Path, about: FileRecord) -> Mapping[str, NDArray[Any]] | NDArray[Any]:
    """The inputs of the file's example: by name in the file of somebody's own module, else the first one."""
    reference = about.reference or {}
    try:
        if about.task == MODULE:
            return ModuleReference.from_metadata(reference).inputs
        return np.asarray(reference["input"])
    except Exception as error:  # a damaged example fails in many ways
        raise ModelFileError(f"{source}: metadata reference must hold an input, on which the edit is verified") from error


def _apply(layer: SignatureLayer, record: LayerRecord, edit: Edit) -> None:
    """Change constants and record, all checked first: the rules are those of the checkpoint's surgery."""
    tile, is_frozen, details = edit.tile_idx, edit.tile_idx in record.frozen, {}
    if edit.action == "insert":
        details = _insert(layer, record, edit)
        is_frozen_now = edit.freeze
    elif edit.action == "remove":
        _remove(layer, is_frozen, tile)
        is_frozen_now = False
    else:
        is_frozen_now = edit.action == "freeze"
        if is_frozen == is_frozen_now:
            state = "frozen already" if is_frozen else "not frozen"
            raise ValueError(f"nothing to {edit.action}: tile ({tile}) of layer ({edit.layer}) is {state}")
        if not is_frozen_now and record.source == "emergent":
            raise ValueError(
                "an emergent signature that is not frozen is read from the tile's weights anew: unfreeze it in the checkpoint "
                "and export that"
            )
    record.frozen = sorted({*record.frozen, tile} if is_frozen_now else {*record.frozen} - {tile})
    entry = {"operation": edit.action, "tile_idx": tile, "step": record.step, "tag": edit.tag, **details, "file": "onnx"}
    record.history = [*record.history, entry]


def _insert(layer: SignatureLayer, record: LayerRecord, edit: Edit) -> dict[str, Any]:
    signature_D, width = np.asarray(edit.signature_D), layer.signature_ED.shape[1]
    if signature_D.shape != (width,):
        raise ValueError(f"signature {signature_D.shape} must have shape {(width,)}")
    is_bad_D = ~np.isin(signature_D, (-1, 0, 1))
    if is_bad_D.any():
        raise ValueError(f"signature[{is_bad_D.argmax()}] ({signature_D[is_bad_D.argmax()]}) must be -1, 0 or 1")
    if not edit.freeze and record.source == "emergent":
        raise ValueError(
            f"freeze ({edit.freeze}) must be True for a router of source 'emergent': "
            "its signatures are read from the tiles' weights, which an inserted one does not change"
        )
    layer.set_signature(edit.tile_idx, signature_D.astype(np.int8))
    # What the tile had earned with its old signature is dropped for the mean of those in use.
    layer.set_bias(edit.tile_idx, float(layer.bias_E[~layer.is_free_E].mean()))
    active = {"positive_dims": signature_D > 0, "negative_dims": signature_D < 0}
    return {"frozen": edit.freeze, **{name: np.flatnonzero(is_active_D).tolist() for name, is_active_D in active.items()}}


def _remove(layer: SignatureLayer, is_frozen: bool, tile: int) -> None:
    if layer.is_free_E[tile]:
        raise ValueError(f"tile_idx ({tile}) must be a tile in use, not a free slot")
    if is_frozen:
        raise ValueError(f"the signature of tile_idx ({tile}) must not be frozen: unfreeze it first")
    num_left = int((~layer.is_free_E).sum()) - 1
    if num_left < layer.top_k:
        raise ValueError(f"tiles in use and in reach after it ({num_left}) must be >= top_k ({layer.top_k})")
    layer.set_bias(tile, -np.inf)


class _Run:
    """One run of a graph on an example, with what its routed layers read and answered, tokens flattened.

    output: outputs of the unchanged graph, by name. Lists by layer, of the graph with open lookups: x [T, D], tile_idx [T, K],
    score [T, E].
    """

    def __init__(self, proto: ModelProto, folder: Path, example: Mapping[str, NDArray[Any]] | NDArray[Any]) -> None:
        companions = {node.output[0] for nodes in signature_nodes(proto.graph) for node in nodes.companions}
        probed = with_open_lookups(proto)
        nodes = [node for node in probed.graph.node if (node.domain, node.op_type) == (DOMAIN, SIGNATURE_ROUTE.name)]
        nodes = [node for node in nodes if node.output[0] not in companions]
        names = [(node.input[0], node.output[0], score) for node, score in zip(nodes, show_scores(nodes), strict=True)]
        shown = {value.name for value in probed.graph.output}
        probed.graph.output.extend(ValueInfoProto(name=name) for name in {n for of_node in names for n in of_node} - shown)
        self.example, self._folder = example, folder
        self.output = self._run(proto)
        routing = self._run(probed)
        self.x: list[NDArray[Any]] = []
        self.tile_idx: list[NDArray[Any]] = []
        self.score: list[NDArray[Any]] = []
        for node, (x, tile_idx, score) in zip(nodes, names, strict=True):
            groups = num_groups(node)
            self.x += [routing[x]] * groups
            self.tile_idx += np.split(routing[tile_idx], groups, axis=1)
            self.score += np.split(routing[score], groups, axis=1)

    def _run(self, proto: ModelProto) -> dict[str, NDArray[Any]]:
        try:
            options = session_options()
        except LibraryNotFoundError:
            options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            session = session_of(proto, self._folder, options)
            names = [value.name for value in session.get_outputs()]
            return dict(zip(names, session.run(names, self._inputs(session)), strict=True))
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise VerificationError(f"onnxruntime cannot run the file: {' '.join(str(error).split())}") from error

    def _inputs(self, session: ort.InferenceSession) -> dict[str, NDArray[Any]]:
        if isinstance(self.example, Mapping):
            return dict(self.example)
        source = session.get_inputs()[0]
        self.example = self.example.astype(np.int64 if source.type == "tensor(int64)" else np.float32)
        return {source.name: self.example, **empty_state(session, len(self.example))}

    def is_answer_finite(self) -> bool:
        """No logit is infinite or NaN; of somebody's own module, no output is NaN."""
        if isinstance(self.example, Mapping):
            floats = [output for output in self.output.values() if np.issubdtype(output.dtype, np.floating)]
            return not any(np.isnan(output).any() for output in floats)
        return bool(np.isfinite(self.output["logits"]).all())

    def as_reference(self, layers: Sequence[SignatureLayer]) -> dict[str, Any]:
        if isinstance(self.example, Mapping):
            return ModuleReference(self.example, self.output, by_torch=False).to_metadata()
        keys = [score_TE + layer.bias_E for score_TE, layer in zip(self.score, layers, strict=True)]
        gaps = [selection_gap(key_TE, layer.top_k) for key_TE, layer in zip(keys, layers, strict=True)]
        tile_idx = self.output["tile_idx"]
        gap = np.stack(gaps, axis=-1).reshape(tile_idx.shape[:-1])
        return LogitsReference(self.example, self.output["logits"], tile_idx, gap, by_torch=False).to_metadata()


def _check_routing(was: _Run, now: _Run, layers: Sequence[SignatureLayer], edit: Edit) -> int:
    """How many tokens are routed otherwise at the edited layer; raises VerificationError."""
    for index, layer in enumerate(layers):
        signature_ED = layer.signature_ED.astype(np.float64)
        norm_E = np.sqrt(np.maximum(np.abs(signature_ED).sum(axis=1), 1))
        score_TE = now.x[index] @ signature_ED.T / norm_E
        key_TE = score_TE + layer.bias_E
        best_TK = -np.sort(-key_TE, axis=1)[:, : layer.top_k]
        chosen_TK = np.take_along_axis(key_TE, now.tile_idx[index], axis=1)
        rounding = SCORE_ROUNDING * max(1.0, float(np.abs(score_TE).max(initial=0.0)))
        _require(np.allclose(now.score[index], score_TE, rtol=0, atol=rounding), f"scores of layer {index} must be numpy's")
        _require(np.allclose(chosen_TK, best_TK, rtol=0, atol=rounding), f"tiles of layer {index} must be numpy's choice")
    others = np.arange(len(layers[edit.layer].signature_ED)) != edit.tile_idx
    old_TE, new_TE = was.score[edit.layer], now.score[edit.layer]
    _require(np.array_equal(old_TE[:, others], new_TE[:, others]), "scores of the other tiles must be as they were")
    old_TK, new_TK = (np.sort(run.tile_idx[edit.layer], axis=1) for run in (was, now))
    is_other_T = (old_TK != new_TK).any(axis=1)
    meets_edit_T = ((old_TK == edit.tile_idx) | (new_TK == edit.tile_idx)).any(axis=1)
    _require(not (is_other_T & ~meets_edit_T).any(), "tokens that never met the edited tile must keep theirs")
    if edit.action == "remove":
        _require(not (new_TK == edit.tile_idx).any(), "no token may go to the removed tile")
    if edit.action in ("freeze", "unfreeze"):
        is_same = all(np.array_equal(was.output[name], now.output[name]) for name in was.output)
        _require(is_same, "the answer must be as it was")
    _require(now.is_answer_finite(), "the answer must be finite")
    return int(is_other_T.sum())


def _write(
    proto: ModelProto,
    output: Path,
    *,
    old: ModelProto,
    folder: Path,
    layer: SignatureLayer,
    record: LayerRecord,
    edit: Edit,
) -> None:
    """The edited file, verified; where the weights of the old one, in the folder, are external data, with data of its own."""

    def verify(partial: Path) -> None:
        partial.write_bytes(proto.SerializeToString())
        written, _, layers, records = read_model(partial)
        found = layers[edit.layer]
        has_edit = np.array_equal(found.signature_ED, layer.signature_ED) and np.array_equal(found.bias_E, layer.bias_E)
        _require(has_edit and records[edit.layer] == record, "the edit must stand in the new file")
        old_constants, new_constants = digests(old, folder), digests(written, partial.parent)
        kept = old_constants.keys() - layer.changed
        _require(
            all(new_constants.get(name) == old_constants[name] for name in kept), "the other constants must be as they were"
        )
        _require(_without_edit(written, layer.places) == _without_edit(old, layer.places), "the rest must be as it was")
        _check_answer(partial)

    if not any(map(is_external, proto.graph.initializer)):
        with whole_file(output) as partial:
            verify(partial)
    else:
        data = data_path(output, data_digest(proto, folder))
        with whole_files(data, output) as (partial_data, partial):
            move_out(proto, partial_data, folder)
            verify(partial)
            set_location(proto, data.name)
            partial.write_bytes(proto.SerializeToString())
    remove_old_data(output)


def _check_answer(path: Path) -> None:
    parity = open_model(path).check_parity()
    _require(parity.agrees(SCORE_ROUNDING), f"the new file must answer as it did before it was written: {parity}")


def _without_edit(proto: ModelProto, places: set[tuple[str, int]]) -> bytes:
    """All but constants, metadata, and the names of the inputs that the edit may have redirected."""
    rest = copy.deepcopy(proto)
    del rest.graph.initializer[:], rest.metadata_props[:]
    for node in rest.graph.node:
        for place in range(len(node.input)):
            if node.output and (node.output[0], place) in places:
                node.input[place] = ""
    return rest.SerializeToString(deterministic=True)


def _require(is_so: bool, rule: str) -> None:
    if not is_so:
        raise VerificationError(f"verification failed: {rule}; no file is written")
