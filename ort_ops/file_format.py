"""What an exported file says about itself besides the graph: JSON values in the ONNX metadata, under one prefix.

:class:`FileRecord` lists them. Needs numpy alone.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 3  # since 3, SignatureRoute has the gate; since 2, language models take and return keys and values
MAX_FILE_BYTES = 2**31 - 1  # as protobuf's own
# Of all the metadata: JSON lists take many times their text in memory. 4096 tokens, 12 layers, 4 tiles each: 250,000 values.
MAX_METADATA_VALUES, MAX_METADATA_BYTES = 4_000_000, 2**28
SINGLE_FILE_BYTES = MAX_FILE_BYTES - MAX_METADATA_BYTES - 2**26  # of weights; the rest is for metadata and nodes
MAX_AXIS = 2**20  # of a size that stands in the metadata alone
MAX_SIZE = 2**63 - 1
BY_ONNXRUNTIME = "onnxruntime"  # the value of reference["by"] where the answer is not torch's
LANGUAGE_MODEL, CLASSIFIER, MODULE, DECODER = "language_model", "classifier", "module", "decoder"  # the tasks
# What tensors in the metadata may be, with numpy's name of their layout.
ARRAY_KINDS = {"float32": "<f4", "float64": "<f8", "float16": "<f2", "int64": "<i8", "int32": "<i4", "int16": "<i2"}
ARRAY_KINDS |= {"int8": "|i1", "uint8": "|u1", "bool": "|b1"}
_PREFIX = "trix."


class ModelFileError(ValueError):
    """The file is missing, damaged, not an exported TriX model, or needs what this installation lacks."""


@dataclass(frozen=True)
class Activations:
    """What the file's ternary products read: activations of 24 bits, nearly as exact as float32, or of 8, in groups of columns.

    How far 24 bits are from float32: see TernaryTileMatMul in ort_ops/operators/ternary_tile_matmul.py.

    Args:
        bits: 24 or 8; routing reads 24 either way. group_size: columns that share a scale at 8 bits: 128, or 0 for all.

    Raises:
        ValueError: another number.
    """

    bits: int = 24
    group_size: int = 128

    def __post_init__(self) -> None:
        if self.bits not in (24, 8):
            raise ValueError(f"bits of the activations ({self.bits}) must be 24 or 8")
        if self.group_size not in (128, 0):
            raise ValueError(f"group_size of the activations ({self.group_size}) must be 128 or 0")


@dataclass(kw_only=True)
class LayerRecord:
    """What the graph does not say of a layer that is routed by signatures.

    kind: its class. source: of its signatures, ``explicit`` or ``emergent``. step: the training batches it has seen. frozen:
    tiles whose signature is held. history: its surgery, in order; an entry with ``file`` "onnx" was done to the exported file.
    claims: the labels counted per tile, [E, C], where it counts. d_model: the width of its signatures; None in older files,
    where it is that of the configuration.
    """

    kind: str = "unknown"
    source: str = "unknown"
    step: int = 0
    frozen: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    claims: list[list[int]] | None = None
    d_model: int | None = None


@dataclass(kw_only=True)
class FileRecord:
    """What a file says about itself besides the graph.

    Attributes:
        task: ``language_model``, ``classifier``, ``module``, a module of somebody's own, or ``decoder``, an imported language
            model. module: the class of somebody's own.
        float32_bytes: the parameters at 4 bytes each.
        config: fields of the model's configuration. activations: what its ternary products read.
        vocabulary, context_length: characters of a model that reads text, and tokens that it looks back. class_names: the
            classes of a classifier, in order.
        reference: an example with torch's answer; with activations of 8 bits, or after surgery on the file, with the file's
            own, by onnxruntime. :mod:`ort_ops.reference` reads it.
        export_parity: what the comparison at export found, at 24 bits. drift: what 8 bits change.
        layers: one record per layer that is routed by signatures, in order; None in files of before there were records.
        provenance: what an imported decoder was made from and by: format, SHA-256 of the source files, version, date, commit.
    """

    task: str | None = None
    float32_bytes: int
    module: str | None = None
    config: dict[str, Any] | None = None
    activations: Activations = field(default_factory=Activations)
    vocabulary: str | None = None
    context_length: int | None = None
    class_names: list[str] | None = None
    reference: dict[str, Any] | None = None
    export_parity: dict[str, Any] | None = None
    drift: dict[str, Any] | None = None
    layers: list[LayerRecord] | None = None
    provenance: dict[str, Any] | None = None

    def to_properties(self) -> dict[str, str]:
        """As ONNX metadata properties.

        Raises:
            ValueError: it is larger than :meth:`from_properties` reads.
        """
        return to_properties({name: value for name, value in asdict(self).items() if value is not None})

    @classmethod
    def from_properties(cls, properties: Mapping[str, str]) -> "FileRecord":
        """From ONNX metadata properties; keys that no field has are left out.

        Raises:
            ValueError: as :func:`from_properties`, and a value of another kind than its field's, or out of its range.
        """
        return cls.from_metadata(from_properties(properties))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> "FileRecord":
        """From what :func:`from_properties` returns; errors as there."""
        kinds = {"task": str, "module": str, "config": dict, "vocabulary": str, "class_names": list, "reference": dict}
        kinds |= {"export_parity": dict, "drift": dict, "provenance": dict}
        values = {
            name: _of_kind(name, metadata.get(name), kind) for name, kind in kinds.items() if metadata.get(name) is not None
        }
        if not all(isinstance(name, str) for name in values.get("class_names", ())):
            raise ValueError(f"metadata class_names ({values['class_names']!r:.40}) must be texts")
        if "context_length" in metadata:
            values["context_length"] = _size("context_length", metadata["context_length"], MAX_AXIS)
        if metadata.get("activations") is not None:
            values["activations"] = _activations(metadata["activations"])
        if metadata.get("layers") is not None:
            values["layers"] = [_layer_record(value) for value in _of_kind("layers", metadata["layers"], list)]
        least = 0 if values.get("task") == MODULE else 1  # a module may have no parameters
        float32_bytes = _size("float32_bytes", metadata.get("float32_bytes"), MAX_SIZE, least)
        return cls(float32_bytes=float32_bytes, **values)

    def require(self, name: str, kind: type) -> Any:
        """The value of a field that not all files have.

        Raises:
            ValueError: this one has none.
        """
        return _of_kind(name, getattr(self, name), kind)


def _of_kind(name: str, value: Any, kind: type) -> Any:
    if type(value) is not kind:  # not isinstance: true is no number
        raise ValueError(f"metadata {name} ({value!r:.40}) must be of type {kind.__name__}")
    return value


def _size(name: str, value: Any, limit: int, least: int = 1) -> int:
    size: int = _of_kind(name, value, int)
    if not least <= size <= limit:
        raise ValueError(f"{name} ({size!r:.40}) must be >= {least}" + (f" and <= {limit}" if size > limit else ""))
    return size


def _activations(value: Any) -> Activations:
    try:
        return Activations(**value)
    except TypeError as error:
        raise ValueError(f"metadata activations ({value!r:.40}) must hold bits and group_size") from error


def _layer_record(value: Any) -> LayerRecord:
    try:
        record = LayerRecord(**value)
    except TypeError as error:
        names = ", ".join(part.name for part in fields(LayerRecord))
        raise ValueError(f"metadata of a layer ({value!r:.40}) must have the keys {names}") from error
    is_named = isinstance(record.kind, str) and isinstance(record.source, str)
    is_history = isinstance(record.history, list) and all(map(_is_operation, record.history))
    has_claims = record.claims is None or (isinstance(record.claims, list) and all(map(_is_ints, record.claims)))
    if not (is_named and _is_ints(record.frozen) and is_history and has_claims and type(record.step) is int):
        raise ValueError(f"metadata of a layer ({value!r:.40}) must hold lists of tiles, a history, a step and lists of claims")
    if record.d_model is not None:
        _size("d_model of a layer", record.d_model, MAX_AXIS)
    return record


def _is_operation(entry: Any) -> bool:
    parts = {"tile_idx": int, "step": int, "operation": str, "tag": str}
    return isinstance(entry, dict) and all(type(entry.get(name)) is kind for name, kind in parts.items())


def _is_ints(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int for number in value)


def to_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as ONNX metadata properties.

    Raises:
        ValueError: it is larger than :func:`from_properties` reads.
    """
    texts = {key: json.dumps(value) for key, value in (dict(metadata) | {"format": FORMAT_VERSION}).items()}
    _check_size(texts)
    return {_PREFIX + key: text for key, text in texts.items()}


def from_properties(properties: Mapping[str, str]) -> dict[str, Any]:
    """Metadata from ONNX metadata properties.

    Raises:
        ValueError: a value is not JSON, they are too many, or the format is not the one of this version.
    """
    ours = {key.removeprefix(_PREFIX): value for key, value in properties.items() if key.startswith(_PREFIX)}
    _check_size(ours)
    try:
        metadata = {key: _from_json(key, value) for key, value in ours.items()}
    except RecursionError as error:
        raise ValueError("metadata must be JSON of ordinary depth, a value is nested too deeply") from error
    if metadata.get("format") != FORMAT_VERSION:
        was_ours = "export its checkpoint again" if "format" in metadata else "was it written by `trix export`?"
        raise ValueError(f"file format ({metadata.get('format')!r:.40}) must be {FORMAT_VERSION}: {was_ours}")
    return metadata


def _check_size(texts: Mapping[str, str]) -> None:
    num_bytes = sum(map(len, texts.values()))
    num_values = sum(text.count(mark) for text in texts.values() for mark in "[{,:")  # an upper bound
    for name, number, limit in (("size", num_bytes, MAX_METADATA_BYTES), ("number of values", num_values, MAX_METADATA_VALUES)):
        if number > limit:
            raise ValueError(f"{name} of the metadata ({number}) must be <= {limit}")


def _from_json(key: str, value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:  # also of an integer of thousands of digits
        raise ValueError(f"metadata {key} must be JSON: {error}") from error


def describe_size(file_bytes: int, float32_bytes: int) -> str:
    """Size of a file compared with that of its parameters at 4 bytes each, for people."""
    ratio = float32_bytes / file_bytes
    return f"{file_bytes / 1e6:.2f} MB; the float32 parameters take {float32_bytes / 1e6:.2f} MB ({ratio:.1f}x)"


def encode_array(values: NDArray[Any], kind: str = "float32") -> dict[str, Any]:
    """An array as JSON: shape, and base64 of its elements, little-endian, as one of ARRAY_KINDS."""
    data = base64.b64encode(values.astype(ARRAY_KINDS[kind]).tobytes()).decode("ascii")
    return {"shape": list(values.shape), f"{kind}_base64": data}


def decode_array(value: Any, kinds: Sequence[str] = ("float32",)) -> NDArray[Any]:
    """The inverse of :func:`encode_array`, for some of its kinds.

    Raises:
        ValueError: shape or data are of another kind, or do not fit each other.
    """
    shape = value.get("shape") if isinstance(value, dict) else None
    kind = next((name for name in kinds if isinstance(value, dict) and isinstance(value.get(f"{name}_base64"), str)), None)
    if not isinstance(shape, list) or not _is_ints(shape) or kind is None:
        raise ValueError(f"array ({value!r:.40}) must have a shape and {kinds[0]}_base64")
    content, dtype = base64.b64decode(value[f"{kind}_base64"], validate=True), np.dtype(ARRAY_KINDS[kind])
    if min(shape, default=0) < 0 or dtype.itemsize * math.prod(shape) != len(content):
        raise ValueError(
            f"data of an array ({len(content)} bytes) must be {dtype.itemsize} bytes for each element of its shape "
            f"({shape!r:.40})"
        )
    return np.frombuffer(content, dtype=dtype).reshape(shape)
