"""A task and the data that it was trained on, rebuilt from its checkpoint alone."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_modules.errors import DataError, UserError

if TYPE_CHECKING:
    from torch import Tensor

    from lightning_modules.data.digits import DigitsDataModule
    from lightning_modules.data.language_id import LanguageIdDataModule
    from lightning_modules.data.text import TextDataModule
    from lightning_modules.tasks import ClassifierTask, LanguageModelTask, RoutedTask

DataT = TypeVar("DataT")


def load_task(ckpt: str, command: str) -> tuple["RoutedTask", dict[str, Any]]:
    """The task of a checkpoint and the checkpoint, for a command that reads no exported models.

    Raises:
        UserError: an ONNX file is given; CheckpointError as ``load_checkpoint``.
    """
    if Path(ckpt).suffix.lower() == ".onnx":
        raise UserError(f"{ckpt}: `trix {command}` reads checkpoints: give the .ckpt file that the ONNX file was exported from")
    from lightning_modules.tasks import load_checkpoint

    return load_checkpoint(ckpt)


def make_text(task: "LanguageModelTask", checkpoint: dict[str, Any], ckpt: Path | str) -> "TextDataModule":
    """The text that a language model was trained on.

    Raises:
        UserError: the checkpoint names no text; DataError: the text cannot be had, or has changed.
    """
    from lightning_modules.data.text import TextDataModule

    text = _make_data(TextDataModule, checkpoint, ckpt)
    if text.vocabulary != task.vocabulary:
        raise DataError(
            f"the text's vocabulary ({text.vocab_size} characters) must equal the checkpoint's "
            f"({len(task.vocabulary)} characters): the text has changed since the training"
        )
    return text


def make_labelled_data(
    task: "ClassifierTask", checkpoint: dict[str, Any], ckpt: Path | str
) -> "DigitsDataModule | LanguageIdDataModule":
    """The images, or where the task has a vocabulary the texts, that a classifier was trained on.

    Raises:
        UserError: the checkpoint names no such data, or data of another kind; DataError: they cannot be had, or have changed.
    """
    from lightning_modules.data.digits import DigitsDataModule
    from lightning_modules.data.language_id import LanguageIdDataModule

    data: DigitsDataModule | LanguageIdDataModule
    if task.vocabulary is None:
        data = _make_data(DigitsDataModule, checkpoint, ckpt)
        width = task.hparams["num_features"]
        if data.num_features != width:
            raise DataError(f"number of features of the data ({data.num_features}) must equal the task's ({width})")
    else:
        data = _make_data(LanguageIdDataModule, checkpoint, ckpt)
        if data.vocabulary != task.vocabulary:
            raise DataError(
                f"the texts' vocabulary ({len(data.vocabulary)} characters) must equal the checkpoint's "
                f"({len(task.vocabulary)} characters): the texts have changed since the training"
            )
    if len(task.class_names) != data.num_classes:
        raise DataError(f"number of classes of the data ({data.num_classes}) must equal the task's ({len(task.class_names)})")
    return data


def held_out(data: "TextDataModule | DigitsDataModule | LanguageIdDataModule", num_tokens: int) -> tuple["Tensor", "Tensor"]:
    """The first sequences of the validation data, at most num_tokens tokens but at least one sequence: inputs, labels."""
    import torch

    inputs: list[Tensor] = []
    labels: list[Tensor] = []
    wanted = 1
    for input_B, label_B in data.val_dataloader():
        wanted = max(num_tokens // input_B.shape[1], 1)
        inputs.append(input_B)
        labels.append(label_B)
        if sum(map(len, inputs)) >= wanted:
            break
    return torch.cat(inputs)[:wanted], torch.cat(labels)[:wanted]


def _make_data(kind: Callable[..., DataT], checkpoint: dict[str, Any], path: Path | str) -> DataT:
    """The data module that the network was trained on, for held-out data."""
    from lightning_modules.tasks.routed_task import CHECKPOINT_KEY

    settings = checkpoint.get("datamodule_hyper_parameters")
    name = checkpoint[CHECKPOINT_KEY].get("data")
    wanted = getattr(kind, "__name__", "")
    if not isinstance(settings, dict) or name != wanted:
        raise UserError(f"{path}: data module ({name}) must be {wanted}, from which held-out data is taken")
    try:
        return kind(**settings)
    except UserError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: the data settings of the checkpoint do not fit: {error}") from error
