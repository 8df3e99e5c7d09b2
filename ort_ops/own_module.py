"""Somebody's own module before its export: names, dynamic axes, outputs as one row of tensors; and how the file is verified."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ort_ops.file_format import ARRAY_KINDS
from ort_ops.parity import SCORE_ROUNDING, OutputDrift, OutputParity, Parity, compare_outputs, output_drift, selection_gap
from ort_ops.reference import ModuleReference
from ort_ops.tracing import Interface, first_cause
from ort_ops.verification import MAX_RELATIVE_DIFFERENCE, ExportError
from trix.nn import SparseLookupFFN, TriXFFN
from trix.nn.bit_linear import BitLinear
from trix.outputs import RoutingDecision

MAX_REFERENCE_BYTES = 2**26  # example inputs and outputs travel in the file's metadata


class FlatModule(nn.Module):
    """A module that returns the tensors of another one's output in one tuple: see :func:`flat_tensors`."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(flat_tensors(self.module(*inputs)))


def flat_tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a tensor, tuple, list, dict or dataclass, or in such ones in it, in order. None, numbers and texts are
    left out.

    Raises:
        ExportError: a value of another type.
    """
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from (tensor for value in output.values() for tensor in flat_tensors(value))
    elif isinstance(output, tuple | list):
        yield from (tensor for value in output for tensor in flat_tensors(value))
    elif is_dataclass(output) and not isinstance(output, type):
        yield from (tensor for part in fields(output) for tensor in flat_tensors(getattr(output, part.name)))
    elif output is not None and not isinstance(output, bool | int | float | str):
        raise ExportError(
            f"output of type {type(output).__name__} must be tensors, or tuples, lists, dicts or dataclasses of them"
        )


class Inputs(NamedTuple):
    """Example inputs as they are traced, their dynamic axes, one entry per tensor, and their names."""

    tensors: tuple[Tensor, ...]
    dynamic_shapes: tuple[Any, ...] | None
    names: list[str]


def read_inputs(
    module: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    dynamic_shapes: Mapping[str, Any] | Sequence[Any] | None,
    input_names: Sequence[str] | None,
) -> Inputs:
    """What the caller of the export gave, checked.

    Raises:
        ExportError: it does not fit the module's forward.
    """
    if not isinstance(module, nn.Module):
        raise ExportError(f"module ({type(module).__name__}) must be an nn.Module")
    given = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    names = _parameter_names(module, given)
    for name, value in zip(names, given, strict=True):
        if not isinstance(value, Tensor):
            raise ExportError(f"example input {name} ({type(value).__name__}) must be a tensor")
        check_dtype(f"example input {name}", value)
        if 0 in value.shape:
            raise ExportError(f"example input {name} {tuple(value.shape)} must have no axis of size 0")
    shapes = None if dynamic_shapes is None else _shapes_of_inputs(names, dynamic_shapes)
    for name, value, shape in zip(names, given, shapes or (), strict=False):
        for axis in _dynamic_axes(shape):
            if not -value.dim() <= axis < value.dim():
                raise ExportError(f"dynamic_shapes: axis ({axis}) of input {name} must be < its number of axes ({value.dim()})")
    # A copy of each: the tracer takes inputs that are one tensor for one input.
    tensors = [
        value.detach().to("cpu", torch.float32 if value.is_floating_point() else value.dtype, copy=True) for value in given
    ]
    if shapes is not None:
        tensors = [_at_least_two(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]
    return Inputs(tuple(tensors), shapes, names if input_names is None else checked_names("input", input_names, len(names)))


def check_dtype(name: str, value: Tensor) -> None:
    """Raises ExportError for floats that float32 does not hold, and for complex numbers."""
    if value.is_complex() or (value.is_floating_point() and value.dtype not in (torch.float32, torch.float16, torch.bfloat16)):
        raise ExportError(
            f"{name} ({value.dtype}) must be float32, float16 or bfloat16: the file computes in float32. "
            "Convert it yourself (float(), or real pairs for complex numbers), so that it is your choice"
        )


def checked_names(kind: str, names: Sequence[str], number: int) -> list[str]:
    """Names for inputs or outputs, as a caller gave them."""
    if isinstance(names, str) or len(names) != number or not all(isinstance(name, str) and name for name in names):
        raise ExportError(f"{kind}_names ({names!r:.80}) must name each of the {number} {kind} tensors")
    if len(set(names)) != len(names):
        raise ExportError(f"{kind}_names ({names!r:.80}) must be distinct")
    return list(names)


def _parameter_names(module: nn.Module, given: Sequence[Any]) -> list[str]:
    """The name of forward's parameter for each tensor; those of ``*inputs`` are inputs_0, inputs_1 ..."""
    signature = inspect.signature(module.forward)
    try:
        bound = signature.bind(*given)
    except TypeError as error:
        raise ExportError(
            f"{type(module).__name__}.forward{signature} must take the {len(given)} example inputs: {error}"
        ) from error
    names: list[str] = []
    for name in bound.arguments:
        is_several = signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL
        names += [f"{name}_{place}" for place in range(len(given) - len(names))] if is_several else [name]
    return names


def _shapes_of_inputs(names: list[str], dynamic_shapes: Mapping[str, Any] | Sequence[Any]) -> tuple[Any, ...]:
    if isinstance(dynamic_shapes, Mapping):
        unknown = sorted(dynamic_shapes.keys() - set(names))
        if unknown:
            raise ExportError(
                f"dynamic_shapes ({', '.join(map(str, unknown))}) must name inputs of the module: {', '.join(names)}"
            )
        return tuple(dynamic_shapes.get(name) for name in names)
    shapes = tuple(dynamic_shapes)
    if len(shapes) != len(names):
        raise ExportError(
            f"dynamic_shapes ({len(shapes)}) must have one entry for each of the {len(names)} inputs: {', '.join(names)}"
        )
    return shapes


def _dynamic_axes(shape: Any) -> dict[int, Any]:
    """Axes whose sizes may change, of one input's entry in dynamic_shapes."""
    axes = dict(shape) if isinstance(shape, Mapping) else dict(enumerate(shape or ()))
    return {axis: dim for axis, dim in axes.items() if not (dim is None or isinstance(dim, int) or _hint(dim) == "STATIC")}


def _hint(dim: Any) -> str:
    """AUTO, DYNAMIC or STATIC for those of Dim, with limits or not; nothing for a name."""
    return str(getattr(getattr(dim, "type", None), "name", ""))


def _at_least_two(tensor: Tensor, shape: Any) -> Tensor:
    """Repeated along dynamic axes of size 1, which torch.export would take for constants."""
    for axis in _dynamic_axes(shape):
        if -tensor.dim() <= axis < tensor.dim() and tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor


def interface(inputs: Inputs) -> Interface:
    """What is traced. Names come afterwards, when it is known which outputs depend on the inputs."""
    # forward(*inputs) is one parameter to the tracer.
    shapes = None if inputs.dynamic_shapes is None else (inputs.dynamic_shapes,)
    return Interface(FlatModule, inputs.tensors, shapes, None, None)


def check_dynamic(exported: torch.export.ExportedProgram, inputs: Inputs) -> None:
    """Raises ExportError where an axis that was to be dynamic got a fixed size, which torch.onnx.export passes over."""
    for name, sizes, shape in zip(inputs.names, _sizes(exported), inputs.dynamic_shapes or (), strict=False):
        for axis, dim in _dynamic_axes(shape).items():
            if _hint(dim) != "AUTO" and isinstance(sizes[axis], int):
                raise ExportError(
                    f"axis {axis} of input {name} must take other sizes, as dynamic_shapes says, but the module computes with "
                    f"{sizes[axis]} alone"
                )


def _sizes(exported: torch.export.ExportedProgram) -> list[list[Any]]:
    """Sizes of each input: numbers, or expressions where they may change."""
    placeholders = {node.name: node.meta.get("val") for node in exported.graph.nodes if node.op == "placeholder"}
    shapes = [placeholders[name].shape for name in exported.graph_signature.user_inputs]
    return [[size.node.expr if isinstance(size, torch.SymInt) else size for size in shape] for shape in shapes]


def other_sizes(exported: torch.export.ExportedProgram, examples: Sequence[Tensor]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Example inputs of other sizes along the dynamic axes, their content repeated or cut.

    Yields groups; the first member of each group that the module accepts is used.
    """
    expressions = _sizes(exported)
    size_of: dict[Any, int] = {}
    for example, row in zip(examples, expressions, strict=True):
        for size, expression in zip(example.shape, row, strict=True):
            for symbol in getattr(expression, "free_symbols", ()):
                size_of[symbol] = size if symbol == expression else size_of.get(symbol, 2)
    for changes in ((1, -1), (None,)):
        group = []
        for change in changes:
            chosen = {
                symbol: _within(exported.range_constraints.get(symbol), 1 if change is None else size + change, size)
                for symbol, size in size_of.items()
            }
            if chosen != size_of:
                sizes = [[int(getattr(e, "subs", lambda _, e=e: e)(chosen)) for e in row] for row in expressions]
                group.append(tuple(_resized(example, row) for example, row in zip(examples, sizes, strict=True)))
        if group:
            yield group


def _within(limits: Any, wanted: int, size: int) -> int:
    if wanted < 1 or (limits is not None and not (limits.lower <= wanted and wanted <= limits.upper)):
        return size
    return wanted


def _resized(example: Tensor, sizes: Sequence[int]) -> Tensor:
    for axis, size in enumerate(sizes):
        if size != example.shape[axis]:
            example = example.index_select(axis, torch.arange(size) % example.shape[axis])
    return example.contiguous()


class ModuleAnswers:
    """What torch answers on example inputs of one or several sizes, outputs by name."""

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        self._module, self._input_names = module, inputs.names
        self._output_names: list[str] = []
        self._kept: list[int] = []
        self._num_near_ties: Counter[str] = Counter()
        try:
            first = self._answer(inputs.tensors)
        except ExportError:
            raise
        except Exception as error:  # whatever the module raises
            raise ExportError(f"{type(module).__name__} fails on the example inputs: {first_cause(error)}") from error
        if not first:
            raise ExportError(f"the output of {type(module).__name__} must hold a tensor")
        for place, output in enumerate(first):
            if output.dtype not in {getattr(torch, kind) for kind in ARRAY_KINDS}:
                raise ExportError(f"output {place} ({output.dtype}) must be of one of the types {', '.join(ARRAY_KINDS)}")
            if output.is_floating_point() and bool(output.isnan().any()):
                num_nan = int(output.isnan().sum())
                raise ExportError(
                    f"output {place} must be numbers on the example inputs: of {output.numel()} values {num_nan} are NaN"
                )
        self.num_outputs = len(first)
        self._runs = [(inputs.tensors, first)]

    def _answer(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), self._counting_near_ties():
            return list(flat_tensors(self._module(*(tensor.clone() for tensor in tensors))))

    @contextmanager
    def _counting_near_ties(self) -> Iterator[None]:
        """Where rounding decides between two tiles or steps of 8 bits, torch and onnxruntime may decide otherwise."""
        hooks = []

        def of_router(router: Any, _: Any, decision: RoutingDecision) -> None:
            self._add_near_ties(decision.score, router.balance_bias, decision.tile_idx.shape[-1])

        def of_lookup(layer: SparseLookupFFN, _: Any, output: Any) -> None:
            self._add_near_ties(output[1]["scores"], layer.router.balance_bias, layer.router.top_k)

        def of_bit_linear(layer: BitLinear, inputs: tuple[Tensor], _: Any) -> None:
            self._num_near_ties["steps of 8 bits"] += layer.num_near_ties(*inputs)

        for module in self._module.modules():
            if isinstance(module, BitLinear):
                hooks.append(module.register_forward_hook(of_bit_linear))
            elif isinstance(module, TriXFFN):
                hooks.append(module.router.register_forward_hook(of_router))
            elif isinstance(module, SparseLookupFFN):
                hooks.append(module.register_forward_hook(of_lookup))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add_near_ties(self, score: Tensor, bias_E: Tensor, top_k: int) -> None:
        self._num_near_ties["tiles"] += int((selection_gap((score + bias_E).numpy(), top_k) <= SCORE_ROUNDING).sum())

    def name_outputs(self, kept: list[int], output_names: Sequence[str] | None) -> list[str]:
        """Names for those outputs that the file has, by their places among the tensors of torch's output."""
        default = [f"output_{place}" for place in range(len(kept))]
        self._kept = kept
        self._output_names = default if output_names is None else checked_names("output", output_names, len(kept))
        for name in set(self._input_names).intersection(self._output_names):
            raise ExportError(f"output_names must be other than input_names ({', '.join(self._input_names)}), {name} is one")
        return self._output_names

    def add_other_sizes(self, groups: Iterator[list[tuple[Tensor, ...]]]) -> tuple[str, ...] | None:
        """Ask torch at other sizes, too; those that the module refuses are skipped.

        Returns the sizes of the inputs that it takes, as text; None where there are no other sizes.
        """
        taken, has_others = [], False
        for group in groups:
            has_others = True
            for tensors in group:
                try:
                    self._runs.append((tensors, self._answer(tensors)))
                except Exception:  # whatever the module raises
                    continue
                taken.append(self._sizes_text(tensors))
                break
        return tuple(taken) if has_others else None

    def parity(self, session: ort.InferenceSession) -> OutputParity:
        parities = [self._parity(session, *run) for run in self._runs]
        largest = max(parity.max_relative_difference for parity in parities)
        return OutputParity(sum(parity.num_values for parity in parities), largest)

    def _parity(self, session: ort.InferenceSession, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> OutputParity:
        sizes = self._sizes_text(tensors)
        try:
            parity = compare_outputs(self._run(session, tensors), self._by_name(outputs))
        except ValueError as error:
            raise ExportError(f"at {sizes}: {error}") from error
        if not parity.agrees(MAX_RELATIVE_DIFFERENCE):
            ties = ", ".join(f"between two {what} {number} times" for what, number in self._num_near_ties.items() if number)
            raise ExportError(
                f"max relative difference to torch ({parity.max_relative_difference:.1e}) must be < "
                f"{MAX_RELATIVE_DIFFERENCE:.0e} and whole numbers that differ ({parity.num_unequal}) must be 0, at {sizes}"
                f"{f'; rounding decided {ties}: try other example inputs' if ties else ''}"
            )
        return parity

    def _sizes_text(self, tensors: Sequence[Tensor]) -> str:
        return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in zip(self._input_names, tensors, strict=True))

    def stepwise_parity(self, session: ort.InferenceSession) -> Parity | None:  # noqa: ARG002
        return None

    def drift(self, session: ort.InferenceSession) -> OutputDrift:
        tensors, outputs = self._runs[0]
        return output_drift(self._run(session, tensors), self._by_name(outputs))

    def reference(self, session: ort.InferenceSession | None = None) -> dict[str, Any]:
        tensors, outputs = self._runs[0]
        answer = self._by_name(outputs) if session is None else self._run(session, tensors)
        inputs = {name: tensor.numpy() for name, tensor in zip(self._input_names, tensors, strict=True)}
        num_bytes = sum(array.nbytes for array in (*inputs.values(), *answer.values()))
        if num_bytes > MAX_REFERENCE_BYTES:
            raise ExportError(
                f"example inputs and outputs ({num_bytes} bytes), which travel in the file, must be <= {MAX_REFERENCE_BYTES}"
            )
        return ModuleReference(inputs, answer, by_torch=session is None).to_metadata()

    def _by_name(self, outputs: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        return {name: outputs[place].numpy() for name, place in zip(self._output_names, self._kept, strict=True)}

    def _run(self, session: ort.InferenceSession, tensors: Sequence[Tensor]) -> dict[str, NDArray[Any]]:
        given = {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in zip(self._input_names, tensors, strict=True)}
        try:
            answers = session.run(self._output_names, given)
        except Exception as error:  # onnxruntime's exceptions share no base class of their own
            raise ExportError(f"onnxruntime can't run the file: {' '.join(str(error).split())}") from error
        return dict(zip(self._output_names, answers, strict=True))
