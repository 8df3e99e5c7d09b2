"""Write a trained model as one ONNX file with packed 2-bit weights, verified against torch before it gets its name.

The packed model's custom operators become the operators of :mod:`ort_ops.schema`. With ``fallback`` the file also holds their
definition in standard ONNX (:mod:`ort_ops.functions`), so that it runs where the native library is not installed.
"""

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
import onnxscript
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ort_ops import schema
from ort_ops.file_format import LayerRecord, describe_size, encode_array, to_properties
from ort_ops.functions import fallback_functions, register_schemas
from ort_ops.graph_nodes import ONNX_OPSET
from ort_ops.library import LibraryNotFoundError, session_options
from ort_ops.panels import to_panels
from ort_ops.parity import Parity, compare, selection_gap
from trix.functional.packing import CODES_PER_BYTE, unpack_ternary
from trix.nn import Classifier, LanguageModel, RoutedLayer, SparseLookupFFN, pack_model, routed_layers
from trix.routing import SignatureRouter

ONNX_IR_VERSION = 9  # the newest that onnxruntime 1.17 reads
MAX_RELATIVE_DIFFERENCE = 1e-4
CHECK_BATCH = 16


class ExportError(ValueError):
    """The model can't be exported, or what was exported does not compute the same; no file was written."""


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with torch on held-out input.

    used_library: the check ran the native kernels, not the portable functions. float32_bytes: the parameters at 4 bytes each.
    """

    parity: Parity
    used_library: bool
    file_bytes: int
    float32_bytes: int

    def __str__(self) -> str:
        kernels = "native kernels" if self.used_library else "portable functions, the native library was not found"
        return f"size    {describe_size(self.file_bytes, self.float32_bytes)}\nparity  {self.parity} ({kernels})"


def export_language_model(
    model: LanguageModel, vocabulary: str, held_out_tokens: Tensor, output: Path | str, fallback: bool = True
) -> ExportReport:
    """Export a language model: ``token`` int64 [B, T] -> ``logits`` [B, T, V] and ``tile_idx`` int64 [B, T, L, K].

    Args:
        model: trained; not changed. vocabulary: the character of each token, in order. held_out_tokens: int64 [N], N >= 2, cut
            into windows of the context length for the parity check.
        output: written whole or not at all. fallback: also write the portable definition of each operator.

    Raises:
        ExportError: the vocabulary does not fit the model or repeats a character, too little held-out text, or no parity.
    """
    if len(vocabulary) != model.vocab_size:
        raise ExportError(f"vocabulary ({len(vocabulary)} characters) must have vocab_size ({model.vocab_size}) characters")
    if len(set(vocabulary)) != len(vocabulary):
        raise ExportError(f"vocabulary ({len(vocabulary)} characters, {len(set(vocabulary))} different) must hold each once")
    if held_out_tokens.dtype != torch.int64 or held_out_tokens.dim() != 1:
        raise ExportError(
            f"held_out_tokens ({held_out_tokens.dtype}, {held_out_tokens.dim()} axes) must be int64 with one axis"
        )
    length = min(model.config.context_length, held_out_tokens.shape[0])
    if length < 2:
        raise ExportError(f"held-out text ({held_out_tokens.shape[0]} tokens) must have at least 2 tokens")
    window_BT = held_out_tokens[: held_out_tokens.shape[0] // length * length].reshape(-1, length)
    metadata = {"task": "language_model", "vocabulary": vocabulary, "context_length": model.config.context_length}
    return _export(model, "token", window_BT, {0: "batch", 1: "time"}, metadata, Path(output), fallback)


def export_classifier(
    model: Classifier,
    class_names: list[str],
    held_out_inputs: Tensor,
    output: Path | str,
    fallback: bool = True,
    vocabulary: str | None = None,
) -> ExportReport:
    """Export a classifier: ``features`` float32 [B, T, F] -> ``logits`` [B, C] and ``tile_idx`` int64 [B, T, L, K].

    With a vocabulary, the input is ``token`` int64 [B, T], the places of the characters in it; token 0 is padding.

    Raises:
        ExportError: class_names or vocabulary do not fit the model, no held-out input, or parity is not reached.
    """
    if len(class_names) != model.head.out_features:
        raise ExportError(f"class_names ({len(class_names)}) must name each of the {model.head.out_features} classes")
    if held_out_inputs.shape[0] < 1:
        raise ExportError(f"held-out input ({held_out_inputs.shape[0]} examples) must have at least 1 example")
    if model.vocab_size != (None if vocabulary is None else len(vocabulary)):
        size = "none" if vocabulary is None else f"{len(vocabulary)} characters"
        raise ExportError(f"vocabulary ({size}) must have vocab_size ({model.vocab_size}) characters")
    metadata: dict[str, Any] = {"task": "classifier", "class_names": class_names}
    if vocabulary is None:
        return _export(model, "features", held_out_inputs, {0: "batch"}, metadata, Path(output), fallback)
    metadata |= {"vocabulary": vocabulary, "context_length": model.config.context_length}
    return _export(model, "token", held_out_inputs, {0: "batch", 1: "time"}, metadata, Path(output), fallback)


class _WithTiles(nn.Module):
    """The model with its routing as a second output, [B, T, L, K], where it has routed layers."""

    def __init__(self, model: LanguageModel | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        logits, infos, _ = self.model(inputs, return_routing=True)
        return (logits, torch.stack([info["tile_idx"] for info in infos], dim=2)) if infos else (logits,)


def _export(
    model: LanguageModel | Classifier,
    input_name: str,
    held_out: Tensor,
    dynamic_axes: dict[int, str],
    metadata: dict[str, Any],
    output: Path,
    fallback: bool,
) -> ExportReport:
    if not output.parent.is_dir():
        raise ExportError(f"the folder of the output ({output.parent}) must exist")
    if output.is_dir():
        raise ExportError(f"the output ({output}) must be a file, it is a folder")
    output = output.resolve()  # a link stays, the file that it names is replaced
    check_finite(model)
    model = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    proto = _to_onnx(pack_model(copy.deepcopy(model)), input_name, held_out[:2], dynamic_axes)
    if fallback:
        proto.functions.extend(fallback_functions())
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        report = _write_verified(model, proto, input_name, held_out, metadata, temporary)
        temporary.replace(output)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    return report


def check_finite(model: nn.Module) -> None:
    """Raises ExportError, which names the parameter or buffer, where a value is NaN or infinite."""
    for name, value in model.state_dict().items():
        is_bad = ~value.isfinite() if isinstance(value, Tensor) and value.is_floating_point() else None
        if is_bad is not None and bool(is_bad.any()):
            num_nan, num_bad = int(value.isnan().sum()), int(is_bad.sum())
            raise ExportError(
                f"weight {name} must be finite: of {value.numel()} values {num_nan} are NaN, {num_bad - num_nan} infinite"
            )


def _to_onnx(
    packed: LanguageModel | Classifier, input_name: str, example: Tensor, dynamic_axes: dict[int, str]
) -> onnx.ModelProto:
    register_schemas()
    opset = onnxscript.values.Opset(schema.DOMAIN, schema.OPSET_VERSION)

    def tile_matmul(x: Any, packed: Any, row_scale: Any, tile_idx: Any) -> Any:
        return opset.TernaryTileMatMul(x, packed, row_scale, tile_idx)

    def ffn(*inputs: Any) -> Any:
        return opset.TernaryFFN(*inputs)

    def route(x: Any, packed: Any, bias: Any, top_k: int) -> Any:
        return opset.SignatureRoute(x, packed, bias, top_k=top_k)

    def lookup(*inputs: Any) -> Any:
        *tensors, grid_size, has_hinges = inputs
        return opset.SparseLookup(*tensors, grid_size=grid_size, has_hinges=int(has_hinges))

    standard = onnxscript.values.Opset("", ONNX_OPSET)

    def stable_sort(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001
        # TopK gives equal values by their index, as a stable sort does; the exporter knows only the other sort.
        size = standard.Gather(standard.Shape(x), standard.Constant(value_ints=[dim]))
        return standard.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            _WithTiles(packed).eval(),
            (example if example.shape[0] > 1 else example.repeat(2, *[1] * (example.dim() - 1)),),
            input_names=[input_name],
            output_names=["logits", "tile_idx"],
            dynamic_shapes=({axis: torch.export.Dim(name) for axis, name in dynamic_axes.items()},),
            opset_version=ONNX_OPSET,
            custom_translation_table={
                torch.ops.trix.ternary_tile_matmul.default: tile_matmul,
                torch.ops.trix.ternary_ffn.default: ffn,
                torch.ops.trix.signature_route.default: route,
                torch.ops.trix.sparse_lookup.default: lookup,
                torch.ops.aten.sort.stable: stable_sort,
            },
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    _lay_in_panels(proto.graph)
    proto.ir_version = ONNX_IR_VERSION
    proto.producer_name = "trix"
    # The exporter notes the source line of every node, with the paths of this machine: two thirds of a small file.
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    return proto


def _lay_in_panels(graph: onnx.GraphProto) -> None:
    """Replace packed rows, as torch holds them, by the panels that the operators take. 00 in a row's padding is a zero."""
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    places = {op.name: [i for i, tensor in enumerate(op.inputs) if tensor.element_type == "uint8"] for op in schema.OPS}
    nodes = [node for node in graph.node if node.domain == schema.DOMAIN]
    for name in {node.input[place] for node in nodes for place in places[node.op_type]}:
        rows = torch.from_numpy(onnx.numpy_helper.to_array(initializers[name]).copy())
        ternary = unpack_ternary(rows, rows.shape[-1] * CODES_PER_BYTE).numpy()
        initializers[name].CopyFrom(onnx.numpy_helper.from_array(to_panels(ternary), name))


class _Expected(NamedTuple):
    """Torch's answer: logits [B, T, V] or [B, C]; tile_idx [B, T, L, K] and gap [B, T, L] where layers are routed."""

    logits: NDArray[np.float32]
    tile_idx: NDArray[np.int64] | None
    gap: NDArray[np.float32] | None


@contextmanager
def _quiet() -> Iterator[None]:
    # torch's exporter warns of packages that it looks for and this project does not use.
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _write_verified(
    model: LanguageModel | Classifier,
    proto: onnx.ModelProto,
    input_name: str,
    held_out: Tensor,
    metadata: dict[str, Any],
    path: Path,
) -> ExportReport:
    expected = _run_torch(model, held_out)
    metadata |= {
        "config": asdict(model.config),
        "float32_bytes": sum(parameter.numel() for parameter in model.parameters()) * 4,
        "reference": _reference(held_out[:1], expected),
        "layers": [
            asdict(_layer_record(layer, layer.router))
            for layer in routed_layers(model)
            if isinstance(layer.router, SignatureRouter)
        ],
    }
    _save(proto, metadata, path)
    onnx.checker.check_model(str(path), full_check=True)
    logits, tile_idx, used_library = _run_onnx(path, input_name, held_out)
    parity = compare(logits, expected.logits, tile_idx, expected.tile_idx, expected.gap)
    if not parity.max_relative_difference < MAX_RELATIVE_DIFFERENCE or parity.num_unexplained:
        raise ExportError(
            f"max relative difference to torch ({parity.max_relative_difference:.1e}) must be < {MAX_RELATIVE_DIFFERENCE:.0e} "
            f"and tokens routed differently without a near tie ({parity.num_unexplained}) must be 0"
        )
    _save(proto, metadata | {"export_parity": asdict(parity) | {"used_library": used_library}}, path)
    return ExportReport(parity, used_library, path.stat().st_size, metadata["float32_bytes"])


def _layer_record(layer: RoutedLayer, router: SignatureRouter) -> LayerRecord:
    claims = layer.claims.count_EC if isinstance(layer, SparseLookupFFN) and layer.claims.count_EC.any() else None
    return LayerRecord(
        kind=type(layer).__name__,
        source=router.source,
        step=int(layer.surgery_log.step),
        frozen=router.is_frozen_E.nonzero().flatten().tolist(),
        has_mass=router.log_mass_E.nonzero().flatten().tolist(),
        history=layer.get_surgery_history(),
        claims=None if claims is None else claims.tolist(),
    )


def _run_torch(model: LanguageModel | Classifier, held_out: Tensor) -> _Expected:
    layers = routed_layers(model)
    logits, tile_idx, gap = [], [], []
    with torch.no_grad():
        for part in torch.split(held_out, CHECK_BATCH):
            part_logits, infos, _ = model(part, return_routing=True)
            logits.append(part_logits.numpy())
            if infos:
                tile_idx.append(torch.stack([info["tile_idx"] for info in infos], dim=2).numpy())
                scores = [info["scores"] + layer.router.balance_bias for info, layer in zip(infos, layers, strict=True)]
                gap.append(np.stack([selection_gap(s.numpy(), tile_idx[-1].shape[-1]) for s in scores], axis=2))
    if not tile_idx:
        return _Expected(np.concatenate(logits), None, None)
    return _Expected(np.concatenate(logits), np.concatenate(tile_idx), np.concatenate(gap))


def _run_onnx(path: Path, input_name: str, held_out: Tensor) -> tuple[NDArray[np.float32], NDArray[np.int64] | None, bool]:
    try:
        options, used_library = session_options(), True
    except LibraryNotFoundError:
        options, used_library = ort.SessionOptions(), False
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {input_name: part.numpy()}) for part in torch.split(held_out, CHECK_BATCH)]
    logits, *tile_idx = (np.concatenate(output) for output in zip(*parts, strict=True))
    return logits, tile_idx[0] if tile_idx else None, used_library


def _reference(held_out: Tensor, expected: _Expected) -> dict[str, Any]:
    """One held-out example with torch's answer, so that parity can be checked wherever the file goes."""
    reference: dict[str, Any] = {
        "input": held_out[:1].tolist(),
        "logits": encode_array(expected.logits[:1]),
    }
    if expected.tile_idx is not None and expected.gap is not None:
        reference["tile_idx"] = expected.tile_idx[:1].tolist()
        reference["gap"] = encode_array(expected.gap[:1])
    return reference


def _save(proto: onnx.ModelProto, metadata: dict[str, Any], path: Path) -> None:
    onnx.helper.set_model_props(proto, to_properties(metadata))
    path.write_bytes(proto.SerializeToString())
