"""The record of one operator: what a file of this folder says of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from onnx import FunctionProto

from ort_ops.operators.checks import Run
from ort_ops.schema import OpSchema

Translation = Callable[..., Any]


@dataclass(frozen=True)
class Operator:
    """One operator of domain `ai.trix`.

    Attributes:
        schema: names, inputs, outputs, attributes. function: makes its definition in standard ONNX operators. check: largest
            error of a small run, relative to numpy's result in float64, for :mod:`ort_ops.self_test`. translations: what the
            exporter writes for operators of torch, whose inputs come in the order of the schema's; made when a model is
            exported, as only then torch and onnxscript are loaded.

    Its native half is `native/ops/<file>_op.cpp`; `tests/support/operator_cases/<file>.py` has random valid inputs to fuzz it.
    """

    schema: OpSchema
    function: Callable[[], FunctionProto]
    check: Callable[[Run], float]
    translations: Callable[[], dict[Any, Translation]] = dict
