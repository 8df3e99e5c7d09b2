"""torch's files, written whole or not at all: one that is there stays as it was until the new one is complete."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from ort_ops.whole_file import whole_file


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's writer makes the file in the system's temporary folder: moved from another disk, it can be cut short."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(checkpoint, Path(path))


def save_whole(value: object, path: Path) -> None:
    """torch.save to `path`, whole or not at all.

    Raises:
        OSError: the file cannot be written; what was at `path` is as it was. It names `path`.
    """
    with whole_file(path) as partial:
        save(value, partial)


def save(value: object, path: Path) -> None:
    """torch.save; a disk that is full is an OSError.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("wb") as file:
        try:
            torch.save(value, file)
        except RuntimeError as error:  # torch then fails to complete the file, which hides what went wrong first
            if isinstance(error.__context__, OSError | KeyboardInterrupt):
                raise error.__context__ from error
            raise
