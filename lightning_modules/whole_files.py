"""torch's files, written whole or not at all: one that is there stays as it was until the new one is complete."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from trix.whole_file import whole_file

CHECKPOINT_SUFFIX = ".ckpt"


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's, with two differences.

    A file is made in the folder where it is to stay: made in the system's temporary folder, as Lightning does, and moved from
    there to another disk, it can be cut short. And nothing is removed but regular .ckpt files that this object has written or
    adopted: callbacks keep the paths of what they want removed in checkpoints, and Lightning would remove a folder with all
    that is in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._own: set[Path] = set()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(checkpoint, Path(path))
        self.adopt(Path(path))

    def adopt(self, path: Path) -> None:
        """Take a file that somebody else has written for one of this run's own."""
        self._own.add(path.parent.resolve() / path.name)

    @override
    def remove_checkpoint(self, path: Path | str) -> None:
        path = Path(path)
        is_own = path.suffix == CHECKPOINT_SUFFIX and path.parent.resolve() / path.name in self._own
        if is_own and path.is_file() and not path.is_symlink():
            path.unlink()
        elif path.exists() or path.is_symlink():
            rank_zero_warn(f"{path} is left as it is: only checkpoints (*{CHECKPOINT_SUFFIX}) of this run are removed")


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
