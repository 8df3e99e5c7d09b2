"""The plain data in a file of torch.save, read without running code and without more memory than the file's size explains.

torch.load with weights_only=True runs no code, but it does as it is told: it unpacks what was compressed, makes a tensor of any
size, builds lists in lists. What a checkpoint has no need of is refused before it reads the file.
"""

import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lightning_modules.tasks.task import CheckpointError
from trix.regular_files import open_regular

MAX_PICKLE_BYTES, MAX_PICKLE_STEPS = 2**26, 1_000_000  # of everything but the tensors' content
MAX_DIRECTORY_BYTES = 2**24  # some 100,000 tensors
MAX_VALUES, MAX_DEPTH = 1_000_000, 64

# What tensors and plain values are made with; it excludes all that makes something of a size which is only named.
_ALLOWED = re.compile(
    r"torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch (?!Untyped)\w+Storage|torch (Size|device|u?int\d+|bool|float\d+"
    r"|bfloat16)|collections (OrderedDict|Counter)|(builtins|__builtin__) (set|complex)|_codecs encode"
)
_RECORD = re.compile(r"[^/]+/(data\.pkl|data/\d+|\.data/serialization_id|version|byteorder|\.\w+)")
_END, _END64 = struct.Struct("<4s4H2LH"), struct.Struct("<4sQ2H2L4Q")
_LOCATOR_BYTES = 20
# Steps that put values into one that is there.
_GROW = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})


class UnsafeFileError(ValueError):
    """The file holds what no checkpoint needs; the text says what."""


def load_plain(path: Path) -> Any:
    """The content, with tensors on the CPU.

    Raises:
        CheckpointError: the file cannot be read, is no zip archive of torch.save, is damaged, or holds anything but tensors and
            plain values, or more than its size explains.
    """
    try:
        file = open_regular(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    with file:
        try:
            _check_archive(file)
            file.seek(0)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a strange pickle before it refuses it
                content = torch.load(file, map_location="cpu", weights_only=True)
            _check_values(content, path.stat().st_size)
        except UnsafeFileError as error:
            raise CheckpointError(f"{path} {error}") from error
        except Exception as error:  # what is raised for a file of another kind depends on its bytes
            raise CheckpointError(f"{path} is not a checkpoint that can be loaded safely (or it is cut short)") from error
    return content


def _check_archive(file: BinaryIO) -> None:
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        size = file.seek(0, 2)
        for part in parts:
            if part.compress_type != zipfile.ZIP_STORED:
                raise UnsafeFileError(f"is not a checkpoint: its part {part.filename[:80]!r} must not be compressed")
        if sum(part.file_size for part in parts) > size:
            total = sum(part.file_size for part in parts)
            raise UnsafeFileError(f"is not a checkpoint: the size of its parts ({total} bytes) must be <= the file's ({size})")
        pickles = [part for part in parts if part.filename.endswith("/data.pkl")]
        names = {part.filename for part in parts}
        if len(pickles) != 1 or len(names) != len(parts) or not all(map(_RECORD.fullmatch, names)):
            raise ValueError("no archive of torch.save")
        # torch.load does not look at the checksums that torch.save writes.
        damaged = archive.testzip()
        if damaged is not None:
            raise UnsafeFileError(f"is damaged: the checksum of its part {damaged} is wrong")
        num_bytes = pickles[0].file_size
        if num_bytes > MAX_PICKLE_BYTES:
            raise UnsafeFileError(f"is not a checkpoint: all but its tensors ({num_bytes} bytes) must be <= {MAX_PICKLE_BYTES}")
        _check_pickle(archive.read(pickles[0]))


def _check_directory(file: BinaryIO) -> None:
    """zipfile makes an object of each entry in the directory of an archive, and thus many times its size."""
    size = file.seek(0, 2)
    file.seek(max(size - _END64.size - _LOCATOR_BYTES - _END.size, 0))
    tail = file.read()
    end, end64 = tail[-_END.size :], tail[: _END64.size]
    directory_bytes: int = _END.unpack(end)[5]
    if tail[-_END.size - _LOCATOR_BYTES :].startswith(b"PK\6\7"):
        directory_bytes = _END64.unpack(end64)[8]
    if not end.startswith(b"PK\5\6"):
        raise ValueError("no archive of torch.save")
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise UnsafeFileError(
            f"is not a checkpoint: the directory of its parts ({directory_bytes} bytes) must be <= {MAX_DIRECTORY_BYTES}"
        )


def _check_pickle(content: bytes) -> None:
    """Follow the steps that build the values, without building any: what is named twice counts twice.

    Ten steps name a tuple of a thousand tuples, and to hash it as a key takes as long as it is large.
    """
    stack: list[list[int] | None] = []  # the number of values in each value; None is a mark
    memo: dict[object, list[int]] = {}

    def popped() -> int:
        cell = stack.pop()
        return 0 if cell is None else cell[0]

    for step, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if step >= MAX_PICKLE_STEPS:
            raise UnsafeFileError(f"is not a checkpoint: the steps that build its values must be <= {MAX_PICKLE_STEPS}")
        if operation.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
            raise UnsafeFileError(
                "is not a checkpoint that can be loaded safely: it must hold tensors and plain values only, not "
                f"{str(argument)[:80].replace(' ', '.')}"
            )
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            top = stack[-1]
            memo[len(memo) if operation.name == "MEMOIZE" else argument] = [1] if top is None else top
        elif operation.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif operation.name == "MARK":
            stack.append(None)
        else:
            taken, made = operation.stack_before, operation.stack_after
            size = 0
            if pickletools.markobject in taken:
                while stack[-1] is not None:
                    size += popped()
                stack.pop()
                taken = taken[: taken.index(pickletools.markobject)]
            cells = [stack.pop() for _ in taken]
            size += sum(cell[0] for cell in cells if cell is not None)
            if operation.name in _GROW:  # the container itself goes on, as others may name it
                grown = cells[-1]
                if grown is None:
                    raise ValueError("no archive of torch.save")
                grown[0] = size
                stack.append(grown)
            else:
                stack += [[1 + size] for _ in made]
            if size > MAX_VALUES:
                raise UnsafeFileError(f"is not a checkpoint: the number of its values must be <= {MAX_VALUES}")


def _check_values(content: Any, size: int) -> None:
    """Raise UnsafeFileError where whoever walks through the values would meet more than the file can hold."""
    tensor_bytes, seen = 0, set[int]()
    for value in walk(content):
        if not isinstance(value, Tensor):
            continue
        num_bytes = value.numel() * value.element_size()
        if num_bytes > value.untyped_storage().nbytes():
            shape, stored = tuple(value.shape), value.untyped_storage().nbytes()
            raise UnsafeFileError(
                f"is damaged: a tensor of shape {shape} ({num_bytes} bytes) must be stored in full ({stored})"
            )
        if id(value) not in seen:
            seen.add(id(value))
            tensor_bytes += num_bytes
    if tensor_bytes > 2 * size:  # twice, as two names may share a tensor
        raise UnsafeFileError(
            f"is damaged: the size of its tensors ({tensor_bytes} bytes) must be <= twice the file's ({size})"
        )


def walk(content: Any) -> Iterator[Any]:
    """Every value and key in nested containers, each as often as it is met.

    Raises:
        UnsafeFileError: there are more than MAX_VALUES of them, or they are nested deeper than MAX_DEPTH.
    """
    waiting, num_values = [(content, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        num_values += 1
        yield value
        inner: list[Any] = []
        if isinstance(value, dict):
            inner = [*value, *value.values(), *getattr(value, "__dict__", {}).values()]
        elif isinstance(value, list | tuple | set):
            inner = list(value)
        if inner and depth == MAX_DEPTH:
            raise UnsafeFileError(f"is not a checkpoint: the depth of its values must be <= {MAX_DEPTH}")
        if num_values + len(waiting) + len(inner) > MAX_VALUES:
            raise UnsafeFileError(f"is not a checkpoint: the number of its values must be <= {MAX_VALUES}")
        waiting += [(one, depth + 1) for one in inner]
