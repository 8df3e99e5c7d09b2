"""The example that travels in a file, with the answer to it, so that parity can be checked wherever the file goes.

onnxruntime and numpy alone. Legend: B sequences, T tokens, L routed layers, K tiles per token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ort_ops.file_format import ARRAY_KINDS, BY_ONNXRUNTIME, decode_array, encode_array
from ort_ops.parity import OutputParity, Parity, compare, compare_outputs

OWN = "its own answers when it was written"
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class LogitsReference:
    """Reference of a language model or classifier.

    inputs: the example, in the type that the file takes. logits: float32 [B, T, V] or [B, C]. tile_idx: int64 [B, T, L, K],
    and gap: float32 [B, T, L], by which they were chosen, where layers are routed. by_torch: whose answer it is.
    """

    inputs: NDArray[Any]
    logits: NDArray[np.float32]
    tile_idx: NDArray[np.int64] | None = None
    gap: NDArray[np.float32] | None = None
    by_torch: bool = True

    def to_metadata(self) -> dict[str, Any]:
        value: dict[str, Any] = {"input": self.inputs.tolist(), "logits": encode_array(self.logits)}
        if self.tile_idx is not None and self.gap is not None:
            value |= {"tile_idx": self.tile_idx.tolist(), "gap": encode_array(self.gap)}
        return value if self.by_torch else value | {"by": BY_ONNXRUNTIME}

    @classmethod
    def from_metadata(cls, value: Mapping[str, Any], dtype: type) -> "LogitsReference":
        """dtype: what the file's first input takes. Whatever is damaged raises an exception, which depends on the damage."""
        tile_idx = np.asarray(value["tile_idx"], dtype=np.int64) if "tile_idx" in value else None
        return cls(
            inputs=np.asarray(value["input"], dtype=dtype),
            logits=decode_array(value["logits"]),
            tile_idx=tile_idx,
            gap=None if tile_idx is None else decode_array(value["gap"]),
            by_torch=value.get("by") != BY_ONNXRUNTIME,
        )

    def parity(self, logits: NDArray[np.float32], tile_idx: NDArray[np.int64] | None) -> Parity:
        if tile_idx is None:
            parity = compare(logits, self.logits)
        elif self.tile_idx is None or self.gap is None:
            raise ValueError("the reference must hold tile_idx and gap, as the file answers tile_idx")
        else:
            parity = compare(logits, self.logits, tile_idx, self.tile_idx, self.gap)
        return replace(parity, compared_with="torch" if self.by_torch else OWN)


@dataclass(frozen=True)
class ModuleReference:
    """Reference of any other module: inputs and outputs by name. by_torch: whose answer it is."""

    inputs: Arrays
    outputs: Arrays
    by_torch: bool = True

    def to_metadata(self) -> dict[str, Any]:
        parts = {"inputs": self.inputs, "outputs": self.outputs}
        value: dict[str, Any] = {
            part: {name: encode_array(array, array.dtype.name) for name, array in arrays.items()}
            for part, arrays in parts.items()
        }
        return value if self.by_torch else value | {"by": BY_ONNXRUNTIME}

    @classmethod
    def from_metadata(cls, value: Mapping[str, Any]) -> "ModuleReference":
        """Whatever is damaged raises an exception, which depends on the damage."""
        inputs, outputs = (_arrays(value[part]) for part in ("inputs", "outputs"))
        return cls(inputs, outputs, by_torch=value.get("by") != BY_ONNXRUNTIME)

    def parity(self, outputs: Arrays) -> OutputParity:
        parity = compare_outputs(outputs, self.outputs)
        return replace(parity, compared_with="torch" if self.by_torch else OWN)


def _arrays(values: Mapping[str, Any]) -> Arrays:
    return {name: decode_array(array, tuple(ARRAY_KINDS)) for name, array in values.items()}
