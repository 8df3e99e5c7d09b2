"""What the commands ask data: examples that training has not seen, and what the data is, in plain words.

Shape suffixes: B examples, T tokens of an example, F values of a token.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import lightning as L
import torch
from torch import Tensor

from lightning_modules.errors import DataError, UserError

MAX_VALUES = 8  # of a token, that are written
BATCH = 256  # documents at a time
MAX_TEXT = 40  # characters of a setting, that are written


class HeldOut(NamedTuple):
    """inputs: [B, ...]. label: [B, ...], or None where batches have none."""

    inputs: Tensor
    label: Tensor | None


class TrixDataModule(L.LightningDataModule):
    """A LightningDataModule that says what it is; what is here also holds, by default, for one that does not derive from it.

    Batches are (inputs, label) or inputs alone. Save what ``__init__`` needs with ``self.save_hyperparameters({...})``, as
    plain values: with them alone a checkpoint rebuilds the data.

    Attributes:
        noun: what an example is called. is_picture: whether an example [T, F] is best drawn as grey values.
    """

    noun: ClassVar[str] = "example"
    is_picture: ClassVar[bool] = False

    def held_out(self, num_tokens: int) -> HeldOut:
        """The first examples of the validation data: at most num_tokens tokens, but at least one example."""
        return first_examples(self, num_tokens)

    def training_documents(self) -> Tensor | None:
        """Training inputs [W, ...] that share nothing, where those of the batches may overlap; None: they do not."""
        return None

    def check_resumed(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise DataError where the run of the checkpoint cannot go on with this data."""

    def facts(self) -> dict[str, str]:
        """What a page says of the data, by name; under ``data`` what it is."""
        return described(self)

    def written(self, x: Tensor) -> list[str]:
        """How each token of one example is written: [T] or [T, F], else the example is one token."""
        return as_numbers(x)


class _DefaultAnswers(TrixDataModule):
    """What is said of a module that does not derive from TrixDataModule."""

    def __init__(self, module: L.LightningDataModule) -> None:
        super().__init__()
        self._module = module

    def held_out(self, num_tokens: int) -> HeldOut:
        return first_examples(self._module, num_tokens)

    def facts(self) -> dict[str, str]:
        return described(self._module)


class RunData:
    """The data that a run trained on, made when it is first asked for.

    Args:
        make: makes the data module; whatever class it is of.

    Attributes:
        module: the data module itself.
    """

    def __init__(self, make: Callable[[], L.LightningDataModule]) -> None:
        self._make = make

    @cached_property
    def module(self) -> L.LightningDataModule:
        module = self._make()
        module.prepare_data()
        module.setup("validate")
        return module

    @cached_property
    def _answers(self) -> TrixDataModule:
        return self.module if isinstance(self.module, TrixDataModule) else _DefaultAnswers(self.module)

    @property
    def noun(self) -> str:
        return self._answers.noun

    @property
    def is_picture(self) -> bool:
        return self._answers.is_picture

    def held_out(self, num_tokens: int) -> HeldOut:
        """As :meth:`TrixDataModule.held_out`.

        Raises:
            DataError: there is no validation data, or none that is made of tensors.
        """
        return self._answers.held_out(num_tokens)

    def facts(self) -> dict[str, str]:
        """As :meth:`TrixDataModule.facts`, with the digests that the data has."""
        return self._answers.facts() | digests(self.module)

    def written(self, x: Tensor) -> list[str]:
        """As :meth:`TrixDataModule.written`."""
        return self._answers.written(x)

    def training_inputs(self, num_tokens: int) -> Iterator[Tensor]:
        """The inputs of the first training batches, until they have num_tokens tokens or an epoch ends; where the data has no
        training batches, those of the validation.

        Raises:
            DataError: a batch is neither a tensor nor (inputs, label).
        """
        has_none = getattr(self.module.train_dataloader, "__func__", None) is L.LightningDataModule.train_dataloader
        if has_none:
            batches = validation_batches(self.module)
        else:
            self.module.setup("fit")
            batches = _examples(self.module.train_dataloader(), type(self.module).__name__)
        for inputs, _ in batches:
            yield inputs
            num_tokens -= inputs.shape[0] * (inputs.shape[1] if is_sequences(inputs) else 1)
            if num_tokens <= 0:
                return

    def training_documents(self, num_tokens: int) -> Iterator[Tensor]:
        """Inputs of the training data that share no text, so that some of them can be held out from the others: what
        :meth:`TrixDataModule.training_documents` says, or else :meth:`training_inputs`."""
        documents = self._answers.training_documents()
        if documents is None:
            return self.training_inputs(num_tokens)
        return (documents[first : first + BATCH] for first in range(0, len(documents), BATCH))

    def example(self, index: int) -> HeldOut:
        """One example of the validation data, as a batch of one.

        Raises:
            UserError: there is no such example.
        """
        num_examples = 0
        for inputs, label in validation_batches(self.module):
            place = index - num_examples
            if 0 <= place < len(inputs):
                return HeldOut(inputs[place : place + 1], None if label is None else label[place : place + 1])
            num_examples += len(inputs)
        raise UserError(f"--index ({index}) must be >= 0 and < validation {self.noun}s ({num_examples})")


def is_sequences(x: Tensor) -> bool:
    """Whether the second axis of a batch counts tokens: ids [B, T], or vectors [B, T, F]."""
    return x.dim() == (3 if x.is_floating_point() else 2)


def validation_batches(data: L.LightningDataModule) -> Iterator[HeldOut]:
    """The batches of val_dataloader, or of the first one where there are several.

    Raises:
        DataError: there is none, or a batch is neither a tensor nor (inputs, label).
    """
    kind = type(data).__name__
    try:
        loader = data.val_dataloader()
    except Exception as error:  # Lightning's own says so in a way of its own
        if type(data).val_dataloader is not L.LightningDataModule.val_dataloader:
            raise
        raise DataError(f"{kind} must have a val_dataloader, from which held-out data is taken") from error
    yield from _examples(loader[0] if isinstance(loader, list | tuple) else loader, kind)


def _examples(loader: Iterable[Any], kind: str) -> Iterator[HeldOut]:
    """The batches of a loader of a data module of this kind."""
    for batch in loader:
        parts = list(batch) if isinstance(batch, list | tuple) else [batch]
        if not parts or not all(isinstance(part, Tensor) for part in parts[:2]):
            raise DataError(
                f"a batch of {kind} ({type(batch).__name__}) must be a tensor or (inputs, label): "
                "a TrixDataModule may have a held_out of its own"
            )
        yield HeldOut(parts[0], parts[1] if len(parts) > 1 else None)


def first_examples(data: L.LightningDataModule, num_tokens: int) -> HeldOut:
    """The first examples of the validation data, at most num_tokens tokens but at least one example."""
    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    wanted = 1
    for input_B, label_B in validation_batches(data):
        wanted = max(num_tokens // (input_B.shape[1] if is_sequences(input_B) else 1), 1)
        inputs.append(input_B)
        labels += [] if label_B is None else [label_B]
        if sum(map(len, inputs)) >= wanted:
            break
    if not inputs:
        raise DataError(f"number of validation batches of {type(data).__name__} (0) must be >= 1")
    return HeldOut(torch.cat(inputs)[:wanted], torch.cat(labels)[:wanted] if labels else None)


def described(data: L.LightningDataModule) -> dict[str, str]:
    """The class, and those of its hyperparameters that are short."""
    settings: Mapping[str, Any] = data.hparams
    shown = [
        f"{name} {value}"
        for name, value in settings.items()
        if isinstance(value, bool | int | float | str) and len(str(value)) <= MAX_TEXT
    ]
    return {"data": f"validation data of {type(data).__name__}" + (f" ({', '.join(shown)})" if shown else "")}


def digests(data: L.LightningDataModule) -> dict[str, str]:
    """Every attribute that is named ..._sha256."""
    return {name: value for name, value in vars(data).items() if name.endswith("_sha256") and isinstance(value, str)}


def as_numbers(x: Tensor) -> list[str]:
    """The tokens of one example, each by its first values."""
    tokens = x if is_sequences(x[None]) else x[None]
    return [_written(token.flatten().tolist()) for token in tokens]


def _written(values: list[Any]) -> str:
    text = ",".join(f"{value:.3g}" if isinstance(value, float) else str(value) for value in values[:MAX_VALUES])
    return text if len(values) <= MAX_VALUES else f"{text},..."
