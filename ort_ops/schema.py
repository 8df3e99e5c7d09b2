"""How the operators of domain `ai.trix` are described: names, inputs, outputs and attributes, as plain data.

The operators themselves are in `ort_ops.operators`.
"""

from dataclasses import dataclass
from typing import Literal

DOMAIN = "ai.trix"
OPSET_VERSION = 1

ElementType = Literal["float32", "uint8", "int64"]


@dataclass(frozen=True)
class TensorSchema:
    """Name, element type and named dimensions of an input or output. is_optional: an output that a node may leave out."""

    name: str
    element_type: ElementType
    shape: tuple[str, ...]
    is_optional: bool = False


@dataclass(frozen=True)
class IntAttribute:
    """An optional integer attribute."""

    name: str
    default: int


@dataclass(frozen=True)
class FloatAttribute:
    """An optional float32 attribute."""

    name: str
    default: float


@dataclass(frozen=True)
class OpSchema:
    """One operator, all inputs required."""

    name: str
    inputs: tuple[TensorSchema, ...]
    outputs: tuple[TensorSchema, ...]
    attributes: tuple[IntAttribute | FloatAttribute, ...]
    doc: str
