"""Trained language models as backends of trix.superposition."""

from collections.abc import Collection
from pathlib import Path

from lightning_modules.tasks.checkpoint import load_checkpoint
from lightning_modules.tasks.language_model import LanguageModelTask
from lightning_modules.tasks.task import CheckpointError, TrixTask
from trix.superposition.backends import TriXBackend


def backend_from_checkpoint(path: Path | str, trusted: Collection[str] = ()) -> TriXBackend:
    """The language model of a checkpoint of ``trix fit``, on the CPU. It is a function of this package and no method of
    TriXBackend, as trix knows no checkpoints.

    Args:
        trusted: the modules, besides this project's, whose task and parts of a network the checkpoint may name.

    Raises:
        CheckpointError: the task is no language model, and as :func:`~lightning_modules.tasks.load_checkpoint`.
    """
    task, _ = load_checkpoint(path, trusted)
    return backend_of(task, path)


def backend_of(task: TrixTask, path: Path | str) -> TriXBackend:
    """The language model of a task. path: the checkpoint that it comes from, for the error.

    Raises:
        CheckpointError: the task is no language model.
    """
    if not isinstance(task, LanguageModelTask):
        raise CheckpointError(f"{path}: task ({task.task_name!r}) must be a language model")
    return TriXBackend(task.network, task.vocabulary)
