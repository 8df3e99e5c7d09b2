"""What commands ask a task, and the answers that serve for any network over any data.

Shape suffixes: B examples, T tokens of an example.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from lightning_modules.data.data_module import RunData
from lightning_modules.errors import UserError

if TYPE_CHECKING:  # what a training has no need of
    from ort_ops.export import ExportReport
    from ort_ops.file_format import Activations
    from trix.introspection.ngrams import CountedText

MAX_LEVELS = 5  # of labels that are no classes


@dataclass(frozen=True)
class Request:
    """What the user asks ``trix why`` about: a text, or an example of the validation data by its number."""

    prompt: str | None = None
    index: int | None = None


class Example(NamedTuple):
    """inputs: one example, as the network takes it. tokens: how each of its tokens is written. subject: what it is."""

    inputs: Tensor
    tokens: list[str]
    subject: str


@dataclass(frozen=True)
class Page:
    """What a page is drawn from: see :func:`trix.introspection.html_report`.

    Args:
        network: what is run on the inputs. facts: what the page says of the data, by name. counted: the text whose n-grams say
            what each tile claims, for a network that routes on context.
    """

    network: nn.Module
    inputs: Tensor
    facts: dict[str, str]
    tokens: Sequence[Sequence[str]] | None = None
    labels: Tensor | None = None
    class_names: Sequence[str] | None = None
    counted: "CountedText | None" = None


class Exporter(Protocol):
    """Writes one ONNX file and compares it with torch."""

    def __call__(self, output: Path, *, fallback: bool, activations: "Activations", external_data: bool) -> "ExportReport": ...


class ExamplesByNumber(nn.Module):
    """A network whose examples are asked for by number, so that any example is T tokens: int64 [B, T] -> its answer."""

    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.network, self.inputs = network, inputs

    def forward(self, index_BT: Tensor) -> Any:
        return self.network(self.inputs[index_BT[:, 0]])


def default_example(kind: str, network: nn.Module, data: RunData, request: Request) -> Example:
    """One example of the validation data. kind: what the error calls the task."""
    if request.index is None:
        raise UserError(f"{kind} needs one of its validation {data.noun}s: --index N")
    inputs, label = data.example(request.index)
    tokens = _tokens(data, inputs, tokens_per_example(network, inputs), first=request.index)[0]
    subject = f"{data.noun} {request.index}"
    if label is not None and label.numel() == 1:
        subject += f", label {label.item():.4g}"
    return Example(inputs, tokens, subject)


def default_page(network: nn.Module, data: RunData, num_tokens: int, class_names: Sequence[str] | None) -> Page:
    """Held-out data, each token by its values, and classes where labels are classes or numbers."""
    inputs, label = data.held_out(num_tokens)
    length = tokens_per_example(network, inputs)
    tokens = _tokens(data, inputs, length)
    labels, names = _classes(label, len(inputs), length, class_names)
    if inputs.shape[:2] != (len(inputs), length):
        network, inputs = ExamplesByNumber(network, inputs), torch.arange(len(inputs))[:, None].expand(-1, length)
    return Page(network, inputs, data.facts(), tokens, labels, names)


def default_exporter(network: nn.Module, data: RunData, num_tokens: int) -> Exporter:
    """The network's forward, input -> output_0, output_1, ..., with a first axis of any size."""
    from ort_ops.export import export

    inputs, _ = data.held_out(num_tokens)
    axes = ({0: torch.export.Dim("batch")},)
    exporter: Exporter = partial(export, network, (inputs,), dynamic_shapes=axes, input_names=["input"])
    return exporter


def tokens_per_example(network: nn.Module, inputs: Tensor) -> int:
    """How many tokens of each example the routed layers get.

    Raises:
        ValueError: there are no routed layers. UserError: they do not all get the same, or not whole tokens of each example.
    """
    from trix.introspection import TriXIntrospector

    some = inputs[:2]
    counts = [len(decision.tile_idx) for decision in TriXIntrospector(network).capture([some]).decision]
    if len(set(counts)) > 1 or counts[0] % len(some):
        raise UserError(
            f"numbers of tokens that the routed layers get of {len(some)} examples ({', '.join(map(str, counts))}) must be "
            "equal, and a multiple of the examples: the task needs answers of its own (TrixTask.page, TrixTask.example)"
        )
    return counts[0] // len(some)


def _tokens(data: RunData, inputs: Tensor, length: int, first: int = 0) -> list[list[str]]:
    """How the tokens of each example are written: by their values where the data has as many, else by their places.

    Args:
        first: the number of the first example.
    """
    written = [data.written(x) for x in inputs]
    if all(len(tokens) == length for tokens in written):
        return written
    return [[f"{data.noun} {index}, token {place}" for place in range(length)] for index in range(first, first + len(inputs))]


def _classes(
    label: Tensor | None, num_examples: int, length: int, names: Sequence[str] | None
) -> tuple[Tensor | None, Sequence[str] | None]:
    """Classes by index, [B] or [B, T], and their names; none where labels fit neither examples nor tokens."""
    if label is not None and label.dim() > 1 and label.shape[-1] == 1:
        label = label.squeeze(-1)
    if label is None or label.is_complex() or label.shape not in ((num_examples,), (num_examples, length)):
        return None, None
    is_class = not label.is_floating_point() and int(label.min()) >= 0
    if is_class and (names is None or int(label.max()) < len(names)):
        return label.long(), names
    return _levels(label)


def _levels(label: Tensor) -> tuple[Tensor, list[str]]:
    """Numbers as classes: the few distinct values, or ranges with as many labels each."""
    values, index = torch.unique(label, return_inverse=True)
    if len(values) <= MAX_LEVELS:
        return index, [f"{value:.4g}" for value in values.tolist()]
    bounds = label.double().flatten().quantile(torch.linspace(0, 1, MAX_LEVELS + 1, dtype=torch.float64))
    ranges = zip(bounds.tolist()[:-1], bounds.tolist()[1:], strict=True)
    return torch.bucketize(label.double(), bounds[1:-1], right=True), [f"{low:.4g}..{high:.4g}" for low, high in ranges]
