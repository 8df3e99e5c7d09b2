"""What an exported file says about itself, beside the graph: JSON values in the ONNX metadata, under one prefix.

Keys: format, task, config, float32_bytes, activations (their bits and group_size in ternary products), reference (an example
with torch's answer; with activations of 8 bits, or after surgery on the file, with the file's own, by onnxruntime),
export_parity (at 24 bits), drift (of 8 bits), layers (one :class:`LayerRecord` per layer routed by signatures); and by task
vocabulary and context_length, or class_names.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 3  # since 3, SignatureRoute has the gate; since 2, language models take and return keys and values
BY_ONNXRUNTIME = "onnxruntime"  # the value of reference["by"] where the answer is not torch's
_PREFIX = "trix."


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
    is_list = isinstance(record.frozen, list) and all(type(tile) is int for tile in record.frozen)
    is_history = isinstance(record.history, list) and all(map(_is_operation, record.history))
    if not is_list or not is_history or type(record.step) is not int:
        raise ValueError(f"metadata of a layer ({value!r:.40}) must hold lists of tiles, a history and a step")
    return record


def _is_operation(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("tile_idx")) is int and {"operation", "step", "tag"} <= entry.keys()


def to_properties(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata as ONNX metadata properties."""
    return {_PREFIX + key: json.dumps(value) for key, value in (dict(metadata) | {"format": FORMAT_VERSION}).items()}


def from_properties(properties: Mapping[str, str]) -> dict[str, Any]:
    """Metadata from ONNX metadata properties.

    Raises:
        ValueError: a value is not JSON, or the format is not the one of this version.
    """
    ours = {key.removeprefix(_PREFIX): value for key, value in properties.items() if key.startswith(_PREFIX)}
    try:
        metadata = {key: _from_json(key, value) for key, value in ours.items()}
    except RecursionError as error:
        raise ValueError("metadata must be JSON of ordinary depth, a value is nested too deeply") from error
    if metadata.get("format") != FORMAT_VERSION:
        was_ours = "export its checkpoint again" if "format" in metadata else "was it written by `trix export`?"
        raise ValueError(f"file format ({metadata.get('format')}) must be {FORMAT_VERSION}: {was_ours}")
    return metadata


def _from_json(key: str, value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"metadata {key} must be JSON: {error}") from error


def describe_size(file_bytes: int, float32_bytes: int) -> str:
    """Size of a file beside that of its parameters at 4 bytes each, for people."""
    ratio = float32_bytes / file_bytes
    return f"{file_bytes / 1e6:.2f} MB; the float32 parameters take {float32_bytes / 1e6:.2f} MB ({ratio:.1f}x)"


def encode_array(values: NDArray[np.floating]) -> dict[str, Any]:
    """A float array as JSON: shape, and base64 of little-endian float32."""
    data = base64.b64encode(values.astype("<f4").tobytes()).decode("ascii")
    return {"shape": list(values.shape), "float32_base64": data}


def decode_array(value: Mapping[str, Any]) -> NDArray[np.float32]:
    """The inverse of :func:`encode_array`."""
    return np.frombuffer(base64.b64decode(value["float32_base64"]), dtype="<f4").reshape(value["shape"])
