"""Reading checkpoint files: as plain data (no code in a file is ever run), with an error that says what is wrong."""

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_modules.tasks.classifier import ClassifierTask
from lightning_modules.tasks.language_model import LanguageModelTask
from lightning_modules.tasks.routed_task import CHECKPOINT_KEY, CHECKPOINT_VERSION, CheckpointError, RoutedTask

# What every checkpoint holds; and what those lack that were saved without the state of the training.
PARTS: dict[str, type] = {
    "state_dict": dict,
    "hyper_parameters": dict,
    "pytorch-lightning_version": str,
    "epoch": int,
    "global_step": int,
    "loops": dict,
}
OPTIMIZER_PARTS: dict[str, type] = {"callbacks": dict, "optimizer_states": list, "lr_schedulers": list}

TASKS: dict[str, type[LanguageModelTask] | type[ClassifierTask]] = {
    task.task_name: task for task in (LanguageModelTask, ClassifierTask)
}


def load_checkpoint(path: Path | str) -> tuple[RoutedTask, dict[str, Any]]:
    """The task of a checkpoint, with its weights, in evaluation mode on the CPU; and the whole checkpoint.

    Raises:
        CheckpointError: as :func:`read_checkpoint`, or the weights do not fit the hyperparameters.
    """
    checkpoint = read_checkpoint(path)
    kind = TASKS[checkpoint[CHECKPOINT_KEY]["task"]]
    try:
        task = kind(**checkpoint["hyper_parameters"])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the hyperparameters of the checkpoint do not fit: {error}") from error
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return task.eval(), checkpoint


def read_checkpoint(path: Path | str) -> dict[str, Any]:
    """The content of a checkpoint file that ``trix fit`` wrote, loaded with weights_only=True on the CPU.

    Raises:
        CheckpointError: the file is missing, a directory, unreadable, no checkpoint, or not one of this project.
    """
    path = Path(path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    try:
        damaged = _damaged_part(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of a strange pickle before it refuses it
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a file of another kind depends on its bytes
        raise CheckpointError(f"{path} is not a checkpoint that can be loaded safely (or it is cut short)") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of its part {damaged} is wrong")
    entry = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("version"), int):
        raise CheckpointError(f"{path} was not written by `trix fit`: it has no entry {CHECKPOINT_KEY!r}")
    if entry["version"] > CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint version ({entry['version']}) must be <= {CHECKPOINT_VERSION}: update trix")
    if entry.get("task") not in list(TASKS):  # a list, for what is not hashable
        raise CheckpointError(f"{path}: task ({entry.get('task')!r}) must be one of {', '.join(TASKS)}")
    _check_parts(checkpoint, path)
    return checkpoint


def check_resumable(checkpoint: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless a training can go on from the checkpoint."""
    for key in OPTIMIZER_PARTS:
        if key not in checkpoint:
            raise CheckpointError(f"the checkpoint holds no {key}, so no training can go on from it (save_weights_only: false)")


def _damaged_part(path: Path) -> str | None:
    """torch.load does not look at the checksums that torch.save writes."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _check_parts(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Lightning takes these as they are: a wrong one would fail somewhere within it."""
    for key, kind in (PARTS | OPTIMIZER_PARTS).items():
        if key not in checkpoint and key in OPTIMIZER_PARTS:
            continue
        if key not in checkpoint:
            raise CheckpointError(f"{path}: the checkpoint lacks {key!r}")
        value = checkpoint[key]
        if not isinstance(value, kind):
            raise CheckpointError(f"{path}: {key} ({type(value).__name__}) of the checkpoint must be of type {kind.__name__}")
        if key == "loops" and not all(isinstance(loop, dict) for loop in checkpoint[key].values()):
            raise CheckpointError(f"{path}: the values of {key} of the checkpoint must be of type dict")
        if isinstance(value, dict) and not all(isinstance(name, str) for name in value):
            raise CheckpointError(f"{path}: the keys of {key} of the checkpoint must be of type str")
