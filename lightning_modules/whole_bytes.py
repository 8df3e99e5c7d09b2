"""Bytes that are written whole or not at all; for torch's files see whole_files. Loads no torch."""

import os
from pathlib import Path


def write_whole(content: bytes | memoryview, path: Path) -> None:
    """Write bytes to `path`, by way of a file beside it that takes its place at the end; the folder is made.

    Raises:
        OSError: the file cannot be written; what was at `path` is as it was.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
