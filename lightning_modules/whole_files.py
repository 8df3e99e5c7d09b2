"""Files that are written whole or not at all: one that is there stays as it was until the new one is complete."""

import io
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from typing_extensions import override

from lightning_modules.whole_bytes import write_whole


class WholeFileCheckpointIO(TorchCheckpointIO):
    """Lightning's writer makes the file in the system's temporary folder: moved from another disk, it can be cut short."""

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Path | str, storage_options: Any | None = None) -> None:
        if storage_options is not None or "://" in str(path):  # not a file of this machine
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(checkpoint, Path(path))


def save_whole(value: object, path: Path) -> None:
    """torch.save to `path`, by way of a file beside it that takes its place at the end.

    Raises:
        OSError: the file cannot be written; what was at `path` is as it was. It names `path`.
    """
    content = io.BytesIO()  # written by torch itself, a full disk would be a RuntimeError about something else
    torch.save(value, content)
    write_whole(content.getbuffer(), path)
