"""Reading checkpoint files: as plain data (no code in a file is ever run), with an error that says what is wrong."""

from pathlib import Path
from typing import Any

import torch

from lightning_modules.tasks.classifier import ClassifierTask
from lightning_modules.tasks.language_model import LanguageModelTask
from lightning_modules.tasks.routed_task import CHECKPOINT_KEY, CHECKPOINT_VERSION, CheckpointError, RoutedTask

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
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch.load raises for a file of another kind depends on its bytes
        raise CheckpointError(f"{path} is not a checkpoint that can be loaded safely (or it is cut short)") from error
    entry = checkpoint.get(CHECKPOINT_KEY) if isinstance(checkpoint, dict) else None
    if not isinstance(entry, dict) or not isinstance(entry.get("version"), int):
        raise CheckpointError(f"{path} was not written by `trix fit`: it has no entry {CHECKPOINT_KEY!r}")
    if entry["version"] > CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: checkpoint version ({entry['version']}) must be <= {CHECKPOINT_VERSION}: update trix")
    if entry.get("task") not in TASKS:
        raise CheckpointError(f"{path}: task ({entry.get('task')!r}) must be one of {', '.join(TASKS)}")
    for key in ("hyper_parameters", "state_dict"):
        if not isinstance(checkpoint.get(key), dict):
            raise CheckpointError(f"{path}: the checkpoint lacks {key!r}")
    return checkpoint
