"""Write a module as one ONNX file with packed 2-bit weights, verified against torch before it gets its name.

The packed layers' custom operators become those of :mod:`ort_ops.operators`. With ``fallback`` the file also holds their
definition in standard ONNX, so that it runs where the native library is not installed. A language model also takes and
returns what its mixers keep of the tokens before (:mod:`ort_ops.state`).
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ort_ops.file_format import CLASSIFIER, LANGUAGE_MODEL, MODULE, Activations
from ort_ops.own_module import ModuleAnswers, check_dtype, check_dynamic, interface, other_sizes, read_inputs
from ort_ops.state import past_name, present_name
from ort_ops.tracing import Interface, name_values, outputs_of_inputs, trace
from ort_ops.translation import translation_table as translation_table
from ort_ops.verification import ExportError as ExportError
from ort_ops.verification import HeldOutAnswers
from ort_ops.written_file import ExportReport as ExportReport
from ort_ops.written_file import OutputFile, check_output, write_file
from trix.nn import Classifier, LanguageModel, pack_model, routed_layers
from trix.outputs import AuxLosses, RoutingInfo

MIN_STATEFUL_CONTEXT = 4  # torch.export takes sizes of 0 and 1 for constants: 2 tokens come after 2
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def export(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: Path | str,
    *,
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    fallback: bool = True,
    activations: Activations | None = None,
    external_data: bool = False,
) -> ExportReport:
    """Export any module of your own that torch's exporter knows, the layers of :mod:`trix.nn` in it packed.

    The file computes what ``module.eval()`` computes in float32. The module itself is not changed; it may be in training mode,
    in bfloat16 or float16, on another device, or packed already. Its output is a tensor, or tuples, lists, dicts or dataclasses
    of tensors, which become the outputs of the file in their order. Tensors that do not depend on the inputs, as the auxiliary
    losses of a layer in evaluation, are left out, and so are None, numbers and texts.

    Args:
        module: what is exported. example_inputs: its positional inputs, or its only one. What the module answers to them is
            compared with what the file answers, and both travel in the file, so that it can be checked anywhere.
        path: written whole or not at all.
        dynamic_shapes: the axes of the inputs whose sizes may change, as ``torch.export.export`` takes them: for each input
            ``{axis: torch.export.Dim(name)}`` or None, in a tuple or in a dict by the names of forward's parameters. With None,
            the default, the file takes inputs of the sizes of the examples alone. Where sizes may change, the file is verified
            at other sizes, too. Sizes that the module refuses are skipped; the report says which were checked.
        input_names: by default those of forward's parameters. output_names: by default output_0, output_1 ...
        fallback: also write the portable definition of each operator. activations: by default of 24 bits.
        external_data: write the weights to a second file next to it, as is done anyway where they take more than the 2 GB that
            one ONNX file can have. Its name is that of the file with 12 hexadecimal digits of the SHA-256 of its bytes and
            ".data". The two files belong together; data of a former export to the same path is removed. Tensors of at most 1024
            bytes stay in the file: with no larger one, there is no second file.

    Raises:
        ExportError: the module cannot be traced or translated (with torch's first cause), holds weights that are not finite or
            that float32 does not hold, or the file does not answer as torch does.

    Example:
        import torch
        from torch import nn
        from ort_ops.export import export
        from ort_ops.runtime import open_model
        from trix.nn import TriXFFN, TriXLinear

        module = nn.Sequential(TriXLinear(24, 32, bias=True), nn.LayerNorm(32), TriXFFN(32, num_tiles=4))
        batch = torch.export.Dim("batch")
        print(export(module, torch.randn(4, 24), "module.onnx", dynamic_shapes=({0: batch},)))
        outputs = open_model("module.onnx").run_outputs({"input": torch.randn(7, 24).numpy()})
    """
    file = OutputFile(Path(path), fallback, activations or Activations(), external_data)
    check_output(file)
    inputs = read_inputs(module, example_inputs, dynamic_shapes, input_names)
    _check_weights(module)
    model = _float_copy(module)
    packed = pack_model(copy.deepcopy(model))  # before the model runs: whatever it changes in itself is no part of the file
    answers = ModuleAnswers(model, inputs)
    traced = trace(packed, interface(inputs))
    check_dynamic(traced.program, inputs)
    graph = traced.proto.graph
    kept = outputs_of_inputs(graph)
    if not kept:
        raise ExportError(f"an output of {type(module).__name__} must depend on an input, none of {len(graph.output)} does")
    name_values(graph, inputs.names, kept, answers.name_outputs(kept, output_names))
    sizes = answers.add_other_sizes(other_sizes(traced.program, inputs.tensors))
    report = write_file(model, traced, answers, file, task=MODULE, module=type(module).__name__)
    return replace(report, other_sizes=sizes)


def export_language_model(
    model: LanguageModel,
    vocabulary: str,
    held_out_tokens: Tensor,
    output: Path | str,
    fallback: bool = True,
    activations: Activations | None = None,
    *,
    external_data: bool = False,
) -> ExportReport:
    """Export a language model: ``token`` int64 [B, T] -> ``logits`` [B, T, V] and ``tile_idx`` int64 [B, T, L, K].

    The file also takes and returns the state after P tokens before, P + T <= context_length: see :mod:`ort_ops.state`.

    Args:
        model: trained; not changed. Weights in float64 are rounded to float32. vocabulary: the character of each token, in
            order. held_out_tokens: int64 [N], N >= 2, cut into windows of the context length for the parity check.
        output: written whole or not at all. fallback: also write the portable definition of each operator. activations: by
            default of 24 bits. external_data: as :func:`export`.

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
    context_length = model.config.context_length
    if context_length < MIN_STATEFUL_CONTEXT:
        raise ExportError(f"context_length ({context_length}) must be >= {MIN_STATEFUL_CONTEXT} to be exported")
    length = min(context_length, held_out_tokens.shape[0])
    if length < 2:
        raise ExportError(f"held-out text ({held_out_tokens.shape[0]} tokens) must have at least 2 tokens")
    window_BT = held_out_tokens[: held_out_tokens.shape[0] // length * length].reshape(-1, length)
    file = OutputFile(Path(output), fallback, activations or Activations(), external_data)
    text = {"vocabulary": vocabulary, "context_length": context_length}
    return _export_logits(model, _stateful_interface(model, window_BT), window_BT, file, task=LANGUAGE_MODEL, **text)


def export_classifier(
    model: Classifier,
    class_names: list[str],
    held_out_inputs: Tensor,
    output: Path | str,
    fallback: bool = True,
    vocabulary: str | None = None,
    activations: Activations | None = None,
    *,
    external_data: bool = False,
) -> ExportReport:
    """Export a classifier: ``features`` float32 [B, T, F] -> ``logits`` [B, C] and ``tile_idx`` int64 [B, T, L, K].

    With a vocabulary, the input is ``token`` int64 [B, T], the places of the characters in it; token 0 is padding.
    Weights and features in float64 are rounded to float32. external_data: as :func:`export`.

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
    if held_out_inputs.is_floating_point():
        held_out_inputs = held_out_inputs.float()
    about: dict[str, Any] = {"task": CLASSIFIER, "class_names": class_names}
    if vocabulary is not None:
        about |= {"vocabulary": vocabulary, "context_length": model.config.context_length}
    file = OutputFile(Path(output), fallback, activations or Activations(), external_data)
    return _export_logits(model, _interface(held_out_inputs, is_text=vocabulary is not None), held_out_inputs, file, **about)


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
        self.num_parts = [len(of_layer) for of_layer in model.state_specs()]

    def forward(self, token_BT: Tensor, past: list[Tensor]) -> tuple[Tensor, ...]:
        """The parts of all layers in one list: the tracer takes no empty tuple of a layer that keeps nothing."""
        parts = iter(past)
        answer, present = self.model(token_BT, state=[tuple(islice(parts, number)) for number in self.num_parts])
        return (*_answer(*answer), *(part for state in present for part in state))


def _answer(logits: Tensor, infos: list[RoutingInfo], _: AuxLosses | None) -> tuple[Tensor, ...]:
    return (logits, torch.stack([info["tile_idx"] for info in infos], dim=2)) if infos else (logits,)


def _interface(held_out: Tensor, is_text: bool) -> Interface:
    axes = {0: torch.export.Dim("batch")} | ({1: torch.export.Dim("time")} if is_text else {})
    name = "token" if is_text else "features"
    return Interface(_WithTiles, (_two(held_out),), (axes,), [name], ["logits", "tile_idx"])


def _stateful_interface(model: LanguageModel, token_BT: Tensor) -> Interface:
    # Without the largest lengths torch traces twice: its first attempt ends with finding them.
    longest = model.config.context_length
    axes: dict[str, Any] = {"batch": torch.export.Dim("batch"), "past": torch.export.Dim("past", max=longest)}
    specs = model.state_specs()
    names = [past_name(spec.name, layer) for layer, of_layer in enumerate(specs) for spec in of_layer]
    has_tiles = bool(routed_layers(model))
    shapes = [spec.shape for of_layer in specs for spec in of_layer]
    # Two texts after two tokens: sizes of 0 and 1 would be taken for constants.
    past = [torch.zeros([size if isinstance(size, int) else 2 for size in shape]) for shape in shapes]
    dynamic = [{axis: axes[size] for axis, size in enumerate(shape) if isinstance(size, str)} for shape in shapes]
    return Interface(
        _WithState,
        (_two(token_BT)[:, :2], past),
        ({0: axes["batch"], 1: torch.export.Dim("time", max=longest)}, dynamic),
        ["token", *names],
        ["logits", *(["tile_idx"] if has_tiles else []), *map(present_name, names)],
    )


def _two(held_out: Tensor) -> Tensor:
    return held_out[:2] if held_out.shape[0] > 1 else held_out.repeat(2, *[1] * (held_out.dim() - 1))


def _export_logits(
    model: LanguageModel | Classifier, interface: Interface, held_out: Tensor, file: OutputFile, **about: Any
) -> ExportReport:
    check_output(file)
    model = _float_copy(model)
    traced = trace(pack_model(copy.deepcopy(model)), interface)
    return write_file(model, traced, HeldOutAnswers(model, held_out), file, config=asdict(model.config), **about)


def _check_weights(module: nn.Module) -> None:
    """Raises ExportError, which names the parameter or buffer, where somebody's own module holds what float32 does not."""
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        check_dtype(f"weight {name}", value)


def _float_copy(model: ModuleT) -> ModuleT:
    """A copy in evaluation, in float32 on the CPU; float64 is rounded."""
    check_finite(model)
    try:
        return copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    except Exception as error:  # whatever a module of somebody's own raises
        raise ExportError(f"{type(model).__name__} must be a module that copy.deepcopy can copy: {error}") from error


def check_finite(model: nn.Module) -> None:
    """Raises ExportError, which names the parameter or buffer, where a value is NaN or infinite.

    Infinite buffers of modules outside ``trix`` pass: masks are made of them.
    """
    foreign = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("trix.")
        for name, _ in module.named_buffers(recurse=False)
    }
    for name, value in model.state_dict().items():
        is_bad = None
        if isinstance(value, Tensor) and value.is_floating_point():
            is_bad = value.isnan() if name in foreign else ~value.isfinite()
        if is_bad is not None and bool(is_bad.any()):
            num_nan, num_bad = int(value.isnan().sum()), int(is_bad.sum())
            raise ExportError(
                f"weight {name} must be finite: of {value.numel()} values {num_nan} are NaN, {num_bad - num_nan} infinite"
            )
