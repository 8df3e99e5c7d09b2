"""What an exported file says about itself, beside the graph: JSON values in the ONNX metadata, under one prefix.

Keys: format, task, config, float32_bytes, reference (an example with torch's answer), export_parity; and by task vocabulary
and context_length, or class_names.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

FORMAT_VERSION = 1
_PREFIX = "trix."


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
        metadata = {key: json.loads(value) for key, value in ours.items()}
    except RecursionError as error:
        raise ValueError("metadata must be JSON of ordinary depth, a value is nested too deeply") from error
    if metadata.get("format") != FORMAT_VERSION:
        raise ValueError(f"file format ({metadata.get('format')}) must be {FORMAT_VERSION}: was it written by `trix export`?")
    return metadata


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
