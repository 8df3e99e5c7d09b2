"""What an exported file says about itself besides the graph: JSON values in the ONNX metadata, under one prefix.

Keys: format, task, config, float32_bytes, activations (their bits and group_size in ternary products), reference (an example
with torch's answer; with activations of 8 bits, or after surgery on the file, with the file's own, by onnxruntime),
export_parity (at 24 bits), drift (of 8 bits), layers (one :class:`LayerRecord` per layer routed by signatures); and by task
vocabulary and context_length, or class_names.
"""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 3  # since 3, SignatureRoute has the gate; since 2, language models take and return keys and values
MAX_FILE_BYTES = 2**31 - 1  # as protobuf's own
# Of all the metadata: JSON lists take many times their text in memory. 4096 tokens, 12 layers, 4 tiles each: 250,000 values.
MAX_METADATA_VALUES, MAX_METADATA_BYTES = 4_000_000, 2**28
MAX_AXIS = 2**20  # of a size that stands in the metadata alone
BY_ONNXRUNTIME = "onnxruntime"  # the value of reference["by"] where the answer is not torch's
_PREFIX = "trix."


class ModelFileError(ValueError):
    """The file is missing, damaged, not an exported TriX model, or needs what this installation lacks."""


@dataclass
class LayerRecord:
    """What the graph does not say of a layer that is routed by signatures.

    kind: its class. source: of its signatures, ``explicit`` or ``emergent``. step: the training batches it has seen. frozen:
    tiles whose signature is held. history: its surgery, in order; an entry with ``file`` "onnx" was done to the exported file.
    claims: the labels counted per tile, [E, C], where it counts.
    """

    kind: str = "unknown"
    source: str = "unknown"
    step: int = 0
    frozen: list[int] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    claims: list[list[int]] | None = None


def layer_records(metadata: Mapping[str, Any], num_layers: int) -> list[LayerRecord]:
    """One per layer that is routed by signatures; empty ones from a file of before there were records.

    Raises:
        ValueError: they are not such records, or not as many as the file has layers.
    """
    values = metadata.get("layers")
    if values is None:
        return [LayerRecord() for _ in range(num_layers)]
    if not isinstance(values, list) or len(values) != num_layers:
        raise ValueError(f"metadata layers ({values!r:.40}) must be a list of {num_layers} layers routed by signatures")
    return [_layer_record(value) for value in values]


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
    """Size of a file beside that of its parameters at 4 bytes each, for people."""
    ratio = float32_bytes / file_bytes
    return f"{file_bytes / 1e6:.2f} MB; the float32 parameters take {float32_bytes / 1e6:.2f} MB ({ratio:.1f}x)"


def encode_array(values: NDArray[np.floating]) -> dict[str, Any]:
    """A float array as JSON: shape, and base64 of little-endian float32."""
    data = base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    return {"shape": list(values.shape), "float32_base64": data}


def decode_array(value: Any) -> NDArray[np.float32]:
    """The inverse of :func:`encode_array`.

    Raises:
        ValueError: shape or data are of another kind, or do not fit each other.
    """
    shape, text = (value.get(key) if isinstance(value, dict) else None for key in ("shape", "float32_base64"))
    if not isinstance(shape, list) or not _is_ints(shape) or not isinstance(text, str):
        raise ValueError(f"array ({value!r:.40}) must have a shape and float32_base64")
    content = base64.b64decode(text, validate=True)
    if min(shape, default=0) < 0 or 4 * math.prod(shape) != len(content):
        raise ValueError(
            f"data of an array ({len(content)} bytes) must be 4 bytes for each element of its shape ({shape!r:.40})"
        )
    return np.frombuffer(content, dtype="<f4").reshape(shape)
