"""Files and folders that are written whole or not at all. Loads nothing but the standard library.

What is written goes to a temporary file in the folder of the target, `.NAME.PID.TOKEN.partial`, which takes the target's name
once it is complete and on the disk. Its writer holds a lock on it. A killed writer leaves the file without one, and the next
file that is written to the folder removes it. On a disk without locks such files stay. The same is true of folders.
"""

import errno
import os
import re
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

if sys.platform == "win32":
    import ctypes
else:
    import fcntl

_PARTIAL = re.compile(r"\..+\.(?P<pid>\d+)\.[0-9a-f]{8}\.partial", re.DOTALL)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty file, which replaces `path` at the end of the block; its folder is made.

    A block that raises leaves `path` as it was, so whatever it writes can be verified there. A link at `path` is replaced, not
    followed.

    Raises:
        OSError: the file cannot be written; it names `path`. Errors of the block about other files pass through.
    """
    with whole_files(path) as (partial,):
        yield partial


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """The same for files of one folder that belong together: the last one names the others, and gets its name last.

    The others must have names that say what they hold, as a digest does: what is replaced by one of them is the same, and the
    old last file keeps its own parts whenever the writer stops. The locks are held until all have their names.
    """
    last = paths[-1]
    partials = [_partial(path) for path in paths]
    descriptors: list[int | None] = []
    try:
        last.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(last.parent)
        try:
            for partial in partials:
                descriptors.append(_create(partial))
            yield partials
            for partial, descriptor in zip(partials, descriptors, strict=True):
                _keep_mode(partial, descriptor)
                _sync(partial)
            _take_names(partials, paths)
        finally:
            for partial, descriptor in zip(partials, descriptors, strict=False):  # those that were created
                with suppress(OSError):
                    partial.unlink()
                if descriptor is not None:
                    os.close(descriptor)
    except OSError as error:
        about = _about(last, partials, error)
        if about is None:
            raise
        raise about from error
    with suppress(OSError):  # the file is there; that its name outlasts a power failure not every file system can promise
        _sync(last.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield the path of a new, empty folder, which gets the name `path` at the end of the block; the folder above it is made.

    At `path` there must be nothing, or an empty folder: no folder is replaced. What is in the folder is on the disk before it
    gets its name. A block that raises leaves nothing.

    Raises:
        OSError: the folder cannot be written; it names `path`. Errors of the block about other files pass through.
    """
    if not path.name or path.is_symlink() or os.path.ismount(path):
        raise OSError(
            errno.EINVAL, "must be a name for a new folder, not a link, a mount point or the working folder", str(path)
        )
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent)
        descriptor = _create_folder(partial)
        try:
            yield partial
            for inner in [*partial.rglob("*"), partial]:
                if inner.is_dir():
                    with suppress(OSError):  # not every file system can
                        _sync(inner)
                else:
                    _sync(inner)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if descriptor is not None:
                os.close(descriptor)
    except OSError as error:
        about = _about(path, [partial], error)
        if about is None:
            raise
        raise about from error
    with suppress(OSError):
        _sync(path.parent)


def _about(target: Path, partials: Collection[Path], error: OSError) -> OSError | None:
    """The error with the name of the target, where it is about the target: its partial files, what is in a partial folder, or
    the folders above it."""
    named = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
    own = (*partials, *target.parents)
    is_about_target = not named or any(  # a full disk names nothing, or both files of a copy
        name in own or any(partial in name.parents for partial in partials) for name in named
    )
    if error.errno is None or not is_about_target:
        return None
    return OSError(error.errno, error.strerror, str(target))


def _keep_mode(partial: Path, descriptor: int | None) -> None:
    """Where a library has put a file of its own in the place of the empty one, as safetensors does, it gets its permissions."""
    if descriptor is not None:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if stat.S_IMODE(partial.stat().st_mode) != mode:
            partial.chmod(mode)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.partial")


def _take_names(partials: Sequence[Path], paths: Sequence[Path]) -> None:
    for partial, path in zip(partials, paths, strict=True):
        if path is paths[-1] and len(paths) > 1:
            with suppress(OSError):  # the names of the others are on the disk before the file that names them
                _sync(path.parent)
        partial.replace(path)


def write_whole(content: bytes, path: Path) -> None:
    """Write bytes to `path`, whole or not at all; the folder is made.

    Raises:
        OSError: the file cannot be written; what was at `path` is as it was.
    """
    with whole_file(path) as partial:
        partial.write_bytes(content)


def remove_abandoned(folder: Path) -> None:
    """Remove the temporary files and folders in the folder whose writers have died; what cannot be removed stays."""
    found: list[Path] = []
    with suppress(OSError), os.scandir(folder) as entries:
        found += [Path(entry.path) for entry in entries if _PARTIAL.fullmatch(entry.name)]
    for partial in found:
        with suppress(OSError):
            if stat.S_ISDIR(partial.lstat().st_mode):
                _remove_if_abandoned(partial, lambda: False)
            else:
                remove_unless_used(partial, lambda: False)


def remove_unless_used(path: Path, is_used: Callable[[], bool]) -> None:
    """Remove a file that :func:`whole_files` has written or begun, unless its writer lives or it is used.

    `is_used` is asked while the file is locked: no writer is about to name it. What cannot be removed stays.
    """
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):
            _remove_if_abandoned(path, is_used)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


if sys.platform == "win32":
    # A file that is open cannot be renamed here, so none is held: whether a writer lives is told by its process number.

    def _create(partial: Path) -> int | None:
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL))
        return None

    def _create_folder(partial: Path) -> int | None:
        partial.mkdir()
        return None

    def _remove_if_abandoned(path: Path, is_used: Callable[[], bool]) -> None:
        match = _PARTIAL.fullmatch(path.name)
        if (match is None or not _is_running(int(match["pid"]))) and not is_used():
            _remove(path)

    def _is_running(pid: int) -> bool:
        QUERY_LIMITED_INFORMATION, ACCESS_DENIED = 0x1000, 5
        kernel = ctypes.WinDLL("kernel32", use_last_error=True)
        handle = kernel.OpenProcess(QUERY_LIMITED_INFORMATION, False, pid)
        if handle:
            kernel.CloseHandle(handle)
            return True
        return ctypes.get_last_error() == ACCESS_DENIED

else:

    def _create(partial: Path) -> int | None:
        """The descriptor that holds the lock until it is closed."""
        return _locked(partial, lambda: os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))  # EXCL follows no link

    def _create_folder(partial: Path) -> int | None:
        """As :func:`_create`."""

        def make() -> int:
            partial.mkdir()
            return os.open(partial, os.O_RDONLY | os.O_NOFOLLOW)

        return _locked(partial, make)

    def _locked(partial: Path, make: Callable[[], int]) -> int:
        while True:
            descriptor = make()
            with suppress(OSError):  # a disk without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_at(partial, descriptor):
                return descriptor
            os.close(descriptor)  # another process found it before it was locked, and has removed it

    def _remove_if_abandoned(path: Path, is_used: Callable[[], bool]) -> None:
        # NFS locks only what is open for writing, which a folder never is.
        access = os.O_RDONLY if path.is_dir() else os.O_RDWR
        descriptor = os.open(path, access | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where its writer lives
            if _is_at(path, descriptor) and not is_used():
                _remove(path)
        finally:
            os.close(descriptor)

    def _is_at(path: Path, descriptor: int) -> bool:
        try:
            return os.path.samestat(path.lstat(), os.fstat(descriptor))
        except FileNotFoundError:
            return False
