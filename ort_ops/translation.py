"""How torch's exporter writes the packed layers' custom operators as the operators of :mod:`ort_ops.operators`.

The operators take ternary matrices in panels (:mod:`ort_ops.panels`), torch holds them in rows (trix.functional.packing).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxscript
import torch

from ort_ops.graph_nodes import ONNX_OPSET
from ort_ops.operators import OPERATORS, register_schemas
from ort_ops.operators.operator import Translation
from ort_ops.panels import BLOCK_BYTES, BLOCK_COLUMNS, PANEL_ROWS
from trix.functional.packing import CODES_PER_BYTE

_ONNX = onnxscript.values.Opset("", ONNX_OPSET)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ``custom_translation_table`` with which your own ``torch.onnx.export`` writes a packed model.

    The file runs wherever the native library is registered. To let it run without, add the portable definitions. Nothing is
    verified and no metadata is written: :func:`ort_ops.export.export` does all of that.

    Example:
        import onnx
        import torch
        from ort_ops.export import translation_table
        from ort_ops.operators import fallback_functions
        from trix.nn import TriXFFN, pack_model

        packed = pack_model(TriXFFN(32, num_tiles=4).eval())
        table = translation_table()
        program = torch.onnx.export(packed, (torch.randn(2, 8, 32),), opset_version=18, custom_translation_table=table)
        model = program.model_proto
        model.functions.extend(fallback_functions())  # only to run it without the library
        onnx.save(model, "model.onnx")
    """
    return make_table(_in_panels)


def make_table(lay_out: Callable[[Any], Any]) -> dict[Callable[..., Any], Callable[..., Any]]:
    """The table; lay_out: what is done to packed rows before an operator reads them."""
    register_schemas()
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.aten.sort.stable: _stable_sort,
        torch.ops.aten.softplus.default: _softplus,
    }
    for operator in OPERATORS.values():
        packed = [place for place, tensor in enumerate(operator.schema.inputs) if tensor.element_type == "uint8"]
        for overload, translate in operator.translations().items():
            table[overload] = _laying_out(translate, packed, lay_out)
    return table


def _laying_out(translate: Translation, packed: list[int], lay_out: Callable[[Any], Any]) -> Translation:
    def translate_laid_out(*inputs: Any) -> Any:
        return translate(*(lay_out(value) if place in packed else value for place, value in enumerate(inputs)))

    return translate_laid_out


def _stable_sort(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001
    # TopK gives equal values by their index, as a stable sort does; the exporter knows only the other sort.
    size = _ONNX.Gather(_ONNX.Shape(x), _ONNX.Constant(value_ints=[dim]))
    return _ONNX.TopK(x, size, axis=dim, largest=int(descending), sorted=1)


def _softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    # One node where the exporter writes three: above torch's threshold of 20, log(1 + exp(x)) is x in float32 anyway.
    if beta == 1.0 and threshold >= 20.0:
        return _ONNX.Softplus(x)
    scaled = _ONNX.Mul(x, beta)
    return _ONNX.Where(_ONNX.Greater(scaled, threshold), x, _ONNX.Div(_ONNX.Softplus(scaled), beta))


def _in_panels(rows: Any) -> Any:
    """Packed rows [..., N, ceil(K / 4)] as panels, by nodes that onnxruntime computes once, when it loads the file."""
    *outer, num_rows, num_bytes = (int(size) for size in rows.shape)
    num_panels = -(-num_rows // PANEL_ROWS)
    num_blocks = -(-num_bytes * CODES_PER_BYTE // BLOCK_COLUMNS)
    padding = (num_panels * PANEL_ROWS - num_rows, num_blocks * BLOCK_COLUMNS // CODES_PER_BYTE - num_bytes)
    before = [0] * (len(outer) + 2)
    padded = _ONNX.Pad(
        _ONNX.Cast(rows, to=onnx.TensorProto.INT32),
        _ONNX.Constant(value_ints=[*before, *before[:-2], *padding]),  # 00 is a zero
    )
    codes = _ONNX.Gather(_ONNX.Constant(value=onnx.numpy_helper.from_array(_PANEL_CODES)), padded)
    # [..., panel, row, block, field of the panel's byte, byte j]: column 4 f + j stands in field j of the row's byte f.
    split = [*outer, num_panels, PANEL_ROWS, num_blocks, 4, CODES_PER_BYTE]
    first = len(outer)
    order = [*range(first), first, first + 2, first + 1, first + 4, first + 3]
    fields = _ONNX.Transpose(_ONNX.Reshape(codes, _ONNX.Constant(value_ints=split)), perm=order)
    values = _ONNX.Mul(fields, _ONNX.Constant(value=onnx.numpy_helper.from_array(np.array([1, 4, 16, 64], dtype=np.int32))))
    summed = _ONNX.ReduceSum(values, _ONNX.Constant(value_ints=[-1]), keepdims=0)
    shape = _ONNX.Constant(value_ints=[*outer, num_panels, num_blocks, BLOCK_BYTES])
    return _ONNX.Reshape(_ONNX.Cast(summed, to=onnx.TensorProto.UINT8), shape)


# The four fields in each byte of a row, as panels write them: 00 (0), 01 (+1) and 10 (-1) become 1, 2 and 0.
_PANEL_CODES = np.array([1, 2, 0, 3], dtype=np.int32)[np.arange(256)[:, None] >> (2 * np.arange(4)) & 3]
