"""Write a trained model as one ONNX file with packed 2-bit weights, verified against torch before it gets its name.

The packed model's custom operators become those of :mod:`ort_ops.operators`. With ``fallback`` the file also holds their
definition in standard ONNX, so that it runs where the native library is not installed. A language model also takes and
returns the keys and values of the tokens before (:mod:`ort_ops.state`).
"""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxscript
import torch
from torch import Tensor, nn

from ort_ops import schema
from ort_ops.file_format import BY_ONNXRUNTIME, LayerRecord, describe_size, to_properties
from ort_ops.graph import (
    Activations,
    divide_by_roots,
    join_reshapes,
    leave_out_unread,
    set_activations,
    share_constants,
    unsqueeze_constants,
)
from ort_ops.graph_nodes import ONNX_OPSET
from ort_ops.operators import SCHEMAS, fallback_functions, register_schemas, translations
from ort_ops.panels import to_panels
from ort_ops.parity import Drift, Parity, drift
from ort_ops.state import past_name, present_name
from ort_ops.verification import CHECK_BATCH, ExportError, open_session, run_stepwise, run_torch, run_whole
from ort_ops.whole_file import whole_file
from trix.functional.packing import CODES_PER_BYTE, unpack_ternary
from trix.nn import Classifier, LanguageModel, RoutedLayer, SparseLookupFFN, pack_model, routed_layers
from trix.outputs import AuxLosses, RoutingInfo
from trix.routing import SignatureRouter

ONNX_IR_VERSION = 9  # the newest that onnxruntime 1.17 reads
MIN_STATEFUL_CONTEXT = 4  # torch.export takes sizes of 0 and 1 for constants: 2 tokens come after 2


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with torch on held-out input.

    parity: on whole sequences, activations at 24 bits. used_library: the check ran the native kernels, not the portable
    functions. float32_bytes: the parameters at 4 bytes each. cached_parity: of a language model that reads half a sequence,
    then token by token. drift: what activations of 8 bits change, where the file has them.
    """

    parity: Parity
    used_library: bool
    file_bytes: int
    float32_bytes: int
    cached_parity: Parity | None = None
    drift: Drift | None = None

    def __str__(self) -> str:
        kernels = "native kernels" if self.used_library else "portable functions, the native library was not found"
        lines = [f"size    {describe_size(self.file_bytes, self.float32_bytes)}", f"parity  {self.parity} ({kernels})"]
        if self.cached_parity is not None:
            lines.append(f"cached  token by token {self.cached_parity}")
        if self.drift is not None:
            lines.append(f"8 bits  {self.drift}")
        return "\n".join(lines)


def export_language_model(
    model: LanguageModel,
    vocabulary: str,
    held_out_tokens: Tensor,
    output: Path | str,
    fallback: bool = True,
    activations: Activations | None = None,
) -> ExportReport:
    """Export a language model: ``token`` int64 [B, T] -> ``logits`` [B, T, V] and ``tile_idx`` int64 [B, T, L, K].

    The file also takes and returns keys and values of P tokens before, P + T <= context_length: see :mod:`ort_ops.state`.

    Args:
        model: trained; not changed. vocabulary: the character of each token, in order. held_out_tokens: int64 [N], N >= 2, cut
            into windows of the context length for the parity check.
        output: written whole or not at all. fallback: also write the portable definition of each operator. activations: by
            default of 24 bits.

    Raises:
        ExportError: the vocabulary does not fit the model or repeats a character, too short a context, too little held-out
            text, or no parity.
    """
    if len(vocabulary) != model.vocab_size:
        raise ExportError(f"vocabulary ({len(vocabulary)} characters) must have vocab_size ({model.vocab_size}) characters")
    if len(set(vocabulary)) != len(vocabulary):
        raise ExportError(f"vocabulary ({len(vocabulary)} characters, {len(set(vocabulary))} different) must hold each once")
    if held_out_tokens.dtype != torch.int64 or held_out_tokens.dim() != 1:
        raise ExportError(
            f"held_out_tokens ({held_out_tokens.dtype}, {held_out_tokens.dim()} axes) must be int64 with one axis"
        )
    if model.config.context_length < MIN_STATEFUL_CONTEXT:
        raise ExportError(f"context_length ({model.config.context_length}) must be >= {MIN_STATEFUL_CONTEXT} to be exported")
    length = min(model.config.context_length, held_out_tokens.shape[0])
    if length < 2:
        raise ExportError(f"held-out text ({held_out_tokens.shape[0]} tokens) must have at least 2 tokens")
    window_BT = held_out_tokens[: held_out_tokens.shape[0] // length * length].reshape(-1, length)
    metadata = {"task": "language_model", "vocabulary": vocabulary, "context_length": model.config.context_length}
    interface = _stateful_interface(model, window_BT)
    return _export(model, interface, window_BT, metadata, Path(output), fallback, activations or Activations())


def export_classifier(
    model: Classifier,
    class_names: list[str],
    held_out_inputs: Tensor,
    output: Path | str,
    fallback: bool = True,
    vocabulary: str | None = None,
    activations: Activations | None = None,
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
    if vocabulary is not None:
        metadata |= {"vocabulary": vocabulary, "context_length": model.config.context_length}
    interface = _interface(held_out_inputs, is_text=vocabulary is not None)
    return _export(model, interface, held_out_inputs, metadata, Path(output), fallback, activations or Activations())


class _Interface(NamedTuple):
    """What is traced: the wrapper of the model, example inputs with their dynamic axes, names of inputs and outputs."""

    wrapper: type[nn.Module]
    examples: tuple[Any, ...]
    dynamic_shapes: tuple[Any, ...]
    input_names: list[str]
    output_names: list[str]


class _WithTiles(nn.Module):
    """The model with its routing as a second output, [B, T, L, K], where it has routed layers."""

    def __init__(self, model: LanguageModel | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return _answer(*self.model(inputs, return_routing=True))


class _WithState(nn.Module):
    """A language model that takes the state of each layer, and returns those for the next call after its answer."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, token_BT: Tensor, past: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        answer, present = self.model(token_BT, state=past)
        return (*_answer(*answer), *(part for state in present for part in state))


def _answer(logits: Tensor, infos: list[RoutingInfo], _: AuxLosses | None) -> tuple[Tensor, ...]:
    return (logits, torch.stack([info["tile_idx"] for info in infos], dim=2)) if infos else (logits,)


def _interface(held_out: Tensor, is_text: bool) -> _Interface:
    axes = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("time")} if is_text else {})
    name = "token" if is_text else "features"
    return _Interface(_WithTiles, (_two(held_out),), (axes,), [name], ["logits", "tile_idx"])


def _stateful_interface(model: LanguageModel, token_BT: Tensor) -> _Interface:
    axes: dict[str, Any] = {name: torch.export.Dim(name) for name in ("batch", "past")}
    specs = model.state_specs()
    names = [past_name(spec.name, layer) for layer, of_layer in enumerate(specs) for spec in of_layer]
    has_tiles = bool(routed_layers(model))
    past, dynamic = [], []
    for of_layer in specs:
        # Two texts after two tokens: sizes of 0 and 1 would be taken for constants.
        past.append(tuple(torch.zeros([size if isinstance(size, int) else 2 for size in spec.shape]) for spec in of_layer))
        dynamic.append(tuple({i: axes[s] for i, s in enumerate(spec.shape) if isinstance(s, str)} for spec in of_layer))
    return _Interface(
        _WithState,
        (_two(token_BT)[:, :2], past),
        ({0: axes["batch"], 1: torch.export.Dim("time")}, dynamic),
        ["token", *names],
        ["logits", *(["tile_idx"] if has_tiles else []), *map(present_name, names)],
    )


def _two(held_out: Tensor) -> Tensor:
    return held_out[:2] if held_out.shape[0] > 1 else held_out.repeat(2, *[1] * (held_out.dim() - 1))


def _export(
    model: LanguageModel | Classifier,
    interface: _Interface,
    held_out: Tensor,
    metadata: dict[str, Any],
    output: Path,
    fallback: bool,
    activations: Activations,
) -> ExportReport:
    if not output.parent.is_dir():
        raise ExportError(f"the folder of the output ({output.parent}) must exist")
    if output.is_dir():
        raise ExportError(f"the output ({output}) must be a file, it is a folder")
    output = output.resolve()  # a link stays, the file that it names is replaced
    check_finite(model)
    model = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    proto = _to_onnx(pack_model(copy.deepcopy(model)), interface)
    if fallback:
        proto.functions.extend(fallback_functions())
    with whole_file(output) as partial:
        return _write_verified(model, proto, held_out, metadata, activations, partial)


def check_finite(model: nn.Module) -> None:
    """Raises ExportError, which names the parameter or buffer, where a value is NaN or infinite."""
    for name, value in model.state_dict().items():
        is_bad = ~value.isfinite() if isinstance(value, Tensor) and value.is_floating_point() else None
        if is_bad is not None and bool(is_bad.any()):
            num_nan, num_bad = int(value.isnan().sum()), int(is_bad.sum())
            raise ExportError(
                f"weight {name} must be finite: of {value.numel()} values {num_nan} are NaN, {num_bad - num_nan} infinite"
            )


def _to_onnx(packed: LanguageModel | Classifier, interface: _Interface) -> onnx.ModelProto:
    register_schemas()
    standard = onnxscript.values.Opset("", ONNX_OPSET)

    def stable_sort(x: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:  # noqa: ARG001
        # TopK gives equal values by their index, as a stable sort does; the exporter knows only the other sort.
        size = standard.Gather(standard.Shape(x), standard.Constant(value_ints=[dim]))
        return standard.TopK(x, size, axis=dim, largest=int(descending), sorted=1)

    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            interface.wrapper(packed).eval(),
            interface.examples,
            input_names=interface.input_names,
            output_names=interface.output_names,
            dynamic_shapes=interface.dynamic_shapes,
            opset_version=ONNX_OPSET,
            custom_translation_table=translations() | {torch.ops.aten.sort.stable: stable_sort},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    unsqueeze_constants(proto.graph)
    divide_by_roots(proto.graph)
    join_reshapes(proto.graph)
    share_constants(proto.graph)
    leave_out_unread(proto.graph)
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
    places = {op.name: [i for i, tensor in enumerate(op.inputs) if tensor.element_type == "uint8"] for op in SCHEMAS}
    nodes = [node for node in graph.node if node.domain == schema.DOMAIN]
    for name in {node.input[place] for node in nodes for place in places[node.op_type]}:
        rows = torch.from_numpy(onnx.numpy_helper.to_array(initializers[name]).copy())
        ternary = unpack_ternary(rows, rows.shape[-1] * CODES_PER_BYTE).numpy()
        initializers[name].CopyFrom(onnx.numpy_helper.from_array(to_panels(ternary), name))


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
    held_out: Tensor,
    metadata: dict[str, Any],
    activations: Activations,
    path: Path,
) -> ExportReport:
    expected = run_torch(model, held_out)
    metadata |= {
        "config": asdict(model.config),
        "float32_bytes": sum(parameter.numel() for parameter in model.parameters()) * 4,
        "activations": asdict(activations),
        "reference": expected.as_reference(held_out, expected.answer),
        "layers": [
            asdict(_layer_record(layer, layer.router))
            for layer in routed_layers(model)
            if isinstance(layer.router, SignatureRouter)
        ],
    }
    _save(proto, metadata, path)
    onnx.checker.check_model(str(path), full_check=True)
    session, used_library = open_session(path)
    parity = expected.parity(run_whole(session, held_out))
    metadata["export_parity"] = asdict(parity) | {"used_library": used_library}
    report = ExportReport(parity, used_library, 0, metadata["float32_bytes"])
    if isinstance(model, LanguageModel):
        report = replace(report, cached_parity=expected.parity(run_stepwise(session, held_out[:CHECK_BATCH])))
    if activations.bits != Activations().bits:
        set_activations(proto.graph, activations)
        _save(proto, metadata, path)
        answer = run_whole(open_session(path)[0], held_out)
        found = drift(*answer, *expected.answer)
        report = replace(report, drift=found)
        # Its answers are no longer torch's: wherever the file goes, it is compared with what it answered here.
        metadata["reference"] = expected.as_reference(held_out, answer) | {"by": BY_ONNXRUNTIME}
        metadata["drift"] = asdict(found)
    _save(proto, metadata, path)
    return replace(report, file_bytes=path.stat().st_size)


def _layer_record(layer: RoutedLayer, router: SignatureRouter) -> LayerRecord:
    claims = layer.claims.count_EC if isinstance(layer, SparseLookupFFN) and layer.claims.count_EC.any() else None
    return LayerRecord(
        kind=type(layer).__name__,
        source=router.source,
        step=int(layer.surgery_log.step),
        frozen=router.is_frozen_E.nonzero().flatten().tolist(),
        history=layer.get_surgery_history(),
        claims=None if claims is None else claims.tolist(),
    )


def _save(proto: onnx.ModelProto, metadata: dict[str, Any], path: Path) -> None:
    onnx.helper.set_model_props(proto, to_properties(metadata))
    path.write_bytes(proto.SerializeToString())
