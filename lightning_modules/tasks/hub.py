"""A trained network as a folder of the Hugging Face Hub: config.json and model.safetensors. No pickle is written or read.

config.json says which task it is and holds its hyperparameters, as plain values. What it names is imported and made under the
same rules as what a checkpoint names.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lightning_modules.class_paths import class_path
from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.tasks.checkpoint import check_finite, make_task
from lightning_modules.tasks.task import CHECKPOINT_KEY, CHECKPOINT_VERSION, CheckpointError, TrixTask
from trix.regular_files import open_regular
from trix.whole_file import whole_files

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
MAX_CONFIG_BYTES = 2**24
_INSTALL = "pip install 'trix[hub]'"


class HubTask(TrixTask, is_base=True):
    """A task that is written to a folder, read from one, and uploaded, by the names of huggingface_hub's PyTorchModelHubMixin.

    It is not that class, which makes a model of whatever its config.json says, and takes half a second to import.
    """

    def save_pretrained(self, save_directory: Path | str) -> None:
        """As :func:`write_pretrained`."""
        write_pretrained(self, Path(save_directory))

    @classmethod
    def from_pretrained(cls, name_or_path: Path | str, trusted: Collection[str] = (), *, revision: str | None = None) -> Self:
        """As :func:`load_pretrained`.

        Raises:
            UserError: as there; CheckpointError: it is another task.
        """
        task = load_pretrained(name_or_path, trusted, revision)
        if not isinstance(task, cls):
            raise CheckpointError(f"task of {name_or_path} ({type(task).__name__}) must be a {cls.__name__}")
        return task

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str = "Upload a model"
    ) -> str:
        """As :func:`push`."""
        return push(self, repo_id, private, token, commit_message)


def write_pretrained(task: TrixTask, folder: Path) -> None:
    """Write config.json and model.safetensors, each whole or not at all; the folder is made.

    Raises:
        CheckpointError: a weight is not finite, or a hyperparameter is no plain value; then nothing is written. OSError.
    """
    state = task.state_dict()
    check_finite(state)
    entry = {"task": task.task_name, "task_class": class_path(type(task)), "version": CHECKPOINT_VERSION}
    about = {"library_name": "trix", CHECKPOINT_KEY: entry, "hyper_parameters": dict(task.hparams)}
    try:
        text = json.dumps(about, indent=2, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the hyperparameters must be plain values: {one_line(error)}") from error
    # Copies, for the format knows no shared memory, as a head's with its embedding.
    weights = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    # Both are on the disk before either gets its name: old settings with new weights are a matter of microseconds.
    with whole_files(folder / WEIGHTS_FILE, folder / CONFIG_FILE) as (weights_partial, config_partial):
        save_file(weights, weights_partial, metadata={"format": "pt"})
        config_partial.write_text(text, encoding="utf-8")


def load_pretrained(name_or_path: Path | str, trusted: Collection[str] = (), revision: str | None = None) -> TrixTask:
    """The task in a folder that :func:`write_pretrained` wrote, or in a repository of the Hub, in evaluation mode on the CPU.

    Args:
        trusted: the modules, besides this project's, whose task and parts of a network the folder may name.
        revision: branch, tag or commit of a repository.

    Raises:
        CheckpointError: no such folder or repository, files that are missing or damaged, or weights that do not fit the
            hyperparameters. UserError: code that is not trusted.
    """
    folder = _local(name_or_path, revision)
    content = _read_config(folder / CONFIG_FILE)
    try:
        with open_regular(folder / WEIGHTS_FILE):
            weights = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{folder / WEIGHTS_FILE} must be a safetensors file: {one_line(error)}") from error
    return make_task({**content, "state_dict": weights}, folder, trusted)


def push(task: TrixTask, repo_id: str, private: bool | None, token: str | None, commit_message: str) -> str:
    """Write the folder, and upload it to a repository, which is made where it is not there; returns the commit's address.

    Raises:
        UserError: huggingface_hub is not installed; CheckpointError as :func:`write_pretrained`; what huggingface_hub raises.
    """
    from tempfile import TemporaryDirectory

    try:
        from huggingface_hub import HfApi
    except ImportError:
        raise UserError(f"push_to_hub needs huggingface_hub: {_INSTALL}") from None
    with TemporaryDirectory() as folder:
        write_pretrained(task, Path(folder))
        api = HfApi(token=token)
        made = api.create_repo(repo_id, private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(raw) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"size of {path} (more than {MAX_CONFIG_BYTES} bytes) must be <= {MAX_CONFIG_BYTES}")
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} must be JSON: {one_line(error)}") from error
    entry = content.get(CHECKPOINT_KEY) if isinstance(content, dict) else None
    settings = content.get("hyper_parameters") if isinstance(content, dict) else None
    if not isinstance(entry, Mapping) or not isinstance(settings, dict) or not isinstance(entry.get("task_class"), str):
        raise CheckpointError(
            f"{path} was not written by save_pretrained: it must hold {CHECKPOINT_KEY!r} and its hyperparameters"
        )
    if entry.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(f"{path}: version ({entry.get('version')!r:.40}) must be {CHECKPOINT_VERSION}")
    return {CHECKPOINT_KEY: entry, "hyper_parameters": settings}


def _local(name_or_path: Path | str, revision: str | None) -> Path:
    if Path(name_or_path).exists():
        if not Path(name_or_path).is_dir():
            raise CheckpointError(f"{name_or_path} must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, it is a file")
        return Path(name_or_path)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(f"{name_or_path} must be a folder; a repository of the Hub needs {_INSTALL}") from None
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # no network, no such repository, no such name
        raise CheckpointError(f"{name_or_path} must be a folder or a repository of the Hub: {one_line(error)}") from error
