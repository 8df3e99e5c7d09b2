"""Files that are written whole or not at all: one that is there stays as it was until the new one is complete."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_modules.whole_bytes import write_whole

CHECKPOINT_SUFFIX = ".ckpt"


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's, with two differences.

    A file is made in the folder where it is to stay: made in the system's temporary folder, as Lightning does, and moved from
    there to another disk, it can be cut short. And what is removed is a regular .ckpt file, in a folder into which this object
    has written before: callbacks keep the paths of what they want removed in checkpoints, and Lightning would remove a folder
    with all that is in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._folders: set[Path] = set()

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(checkpoint, Path(path))
        self._folders.add(Path(path).parent.resolve())

    @override
    def remove_checkpoint(self, path: Path | str) -> None:
        path = Path(path)
        is_own = path.suffix == CHECKPOINT_SUFFIX and path.parent.resolve() in self._folders
        if is_own and path.is_file() and not path.is_symlink():
            path.unlink()
        elif path.exists() or path.is_symlink():
            rank_zero_warn(f"{path} is left as it is: only checkpoints (*{CHECKPOINT_SUFFIX}) of this run's folder are removed")


def save_whole(value: object, path: Path) -> None:
    """torch.save to `path`, by way of a file beside it that takes its place at the end.

    Raises:
        OSError: the file cannot be written; what was at `path` is as it was. It names `path`.
    """
    content = io.BytesIO()  # written by torch itself, a full disk would be a RuntimeError about something else
    torch.save(value, content)
    write_whole(content.getbuffer(), path)
