"""The file that a command is asked to write: checked before anything slow, its folder made."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from lightning_modules.errors import UserError

KEPT = (".ckpt", ".onnx")


def check_output_file(output: Path, ckpt: Path, kept: Sequence[str] = KEPT) -> None:
    """Raise UserError where the output is no file, or is the checkpoint itself, or another file that is there with one of the
    endings that are to be kept: a page never takes the place of a network."""
    try:
        if output.is_dir():
            raise UserError(f"output {output} must be a file, not a directory")
        if output.exists() and not output.is_file():
            raise UserError(f"output {output} must be a file, not a device or pipe")
        if output.exists() and ckpt.exists() and output.samefile(ckpt):
            raise UserError(f"output {output} must be another file than the checkpoint, which it would replace")
        if output.exists() and output.suffix.lower() in kept:
            raise UserError(f"output {output} must not exist yet: no {output.suffix.lower()} file is replaced")
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error


def check_output_folder(path: Path) -> None:
    """Raise UserError where no file can be written to the folder or, as long as it is not there, next to it."""
    try:
        nearest = next(folder for folder in (path, *path.parents) if folder.exists())
        if nearest == path and not path.is_dir():
            raise UserError(f"output {path} must be a folder")
        with TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"output {path} cannot be written: {error.strerror or error}") from error


def check_new_folder(path: Path) -> None:
    """Raise UserError where no folder can be written to `path`: there must be nothing yet, or an empty folder."""
    check_output_folder(path)
    if path.exists() and any(path.iterdir()):
        raise UserError(f"output {path} must be empty or not exist yet: no folder is replaced")


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
