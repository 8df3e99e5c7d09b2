"""Files that somebody else may have made: read only where they are regular files of a bounded size. Loads nothing heavy.

What is no such file is an OSError whose ``strerror`` says the rule and the value, as that of a missing file does.
"""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

_KINDS = {stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_regular(path: Path | str, limit: int | None = None) -> BinaryIO:
    """Open a regular file for reading; a link is followed. limit: the largest size in bytes.

    Raises:
        OSError: as ``open``; also for a folder, pipe, socket or device, a file above the limit, and a name that no file has.
    """
    try:
        _check(path, Path(path).stat(), limit)  # before it is opened: to open a device can change it
        # Not to wait for a writer, should a pipe have taken the file's place.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the name
        raise OSError(errno.EINVAL, str(error), str(path)) from error
    try:
        _check(path, os.fstat(descriptor), limit)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, limit: int) -> bytes:
    """The bytes of a regular file of at most ``limit``; errors as :func:`open_regular`."""
    with open_regular(path, limit) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)  # not more: the memory for it is taken beforehand
    if len(content) > size:  # one of those that the system makes up as they are read, or it has just grown
        raise OSError(errno.EINVAL, f"it must hold the bytes of its size ({size}), not more", str(path))
    return content


def check_regular(path: Path | str, limit: int | None = None) -> None:
    """Raise OSError unless :func:`open_regular` can open the file."""
    open_regular(path, limit).close()


def is_plain_name(name: str) -> bool:
    """Whether a text from a file names a file of the folder where it is used, on any system: no path, drive or stream."""
    is_text = name.isprintable() and name not in ("", ".", "..")
    return is_text and name == Path(name).name and not set(name) & set("/\\:")


def _check(path: Path | str, status: os.stat_result, limit: int | None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it must be a regular file, not {kind}", str(path))
    if limit is not None and status.st_size > limit:
        raise OSError(errno.EFBIG, f"its size ({status.st_size} bytes) must be <= {limit}", str(path))
