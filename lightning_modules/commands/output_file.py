"""The file that a command is asked to write: checked before anything slow, its folder made."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_modules.errors import UserError


def check_output_file(output: Path, ckpt: Path) -> None:
    """Raise UserError where the output is no file, or is the checkpoint itself: nothing but a file is ever replaced."""
    try:
        if output.is_dir():
            raise UserError(f"output {output} must be a file, not a directory")
        if output.exists() and not output.is_file():
            raise UserError(f"output {output} must be a file, not a device or pipe")
        if output.exists() and ckpt.exists() and output.samefile(ckpt):
            raise UserError(f"output {output} must be another file than the checkpoint, which it would replace")
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make the folder and those above it; should the work in it fail, the new ones go again."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise
