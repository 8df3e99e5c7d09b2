"""Arrays and shards on disk: safetensors written here, and the ``.npy`` files of the interface that this package follows.

N tokens of a shard.
"""

import io
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trix.regular_files import check_regular, open_regular
from trix.whole_file import whole_file, write_whole

MAX_HEADER_BYTES = 2**20  # of a shard with a handful of columns; ours take 500 bytes
_LENGTH_BYTES = 8
_BLOCK_BYTES = 2**20
_unread: dict[Path, int] = {}  # CRC-32 that a shard must have when it is first read
_checked: dict[Path, int] = {}  # CRC-32 that a shard was found to have


class ColumnInfo(NamedTuple):
    """dtype: as safetensors names it, BF16 or I64. shape: sizes, tokens first."""

    dtype: str
    shape: tuple[int, ...]


def save_npy(path: Path | str, arr: NDArray[Any]) -> None:
    """Write an array as .npy, whole or not at all; the folder is made.

    Raises:
        ValueError: an array of Python objects. OSError: it cannot be written.
    """
    content = io.BytesIO()
    np.save(content, arr, allow_pickle=False)
    write_whole(content.getvalue(), Path(path))


def load_npy(path: Path | str, mmap: bool = True) -> NDArray[Any]:
    """The array of an .npy file, read-only; with ``mmap`` it is read from the disk as it is used.

    Raises:
        ValueError: no .npy file, one of Python objects, or one that was cut short. OSError: no regular file.
    """
    check_regular(path)
    try:
        array = np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} ({Path(path).stat().st_size} bytes) must be a whole .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{path} must hold one array, it is an archive")
    return array


def shard_paths(dir: Path | str, stem: str) -> list[Path]:
    """The shards in a folder, in order: ``shard_*.safetensors``, each with all columns, or ``*_{stem}.npy``.

    Raises:
        ValueError: both kinds, or none.
    """
    shards, arrays = sorted(Path(dir).glob("shard_*.safetensors")), sorted(Path(dir).glob(f"*_{stem}.npy"))
    if bool(shards) == bool(arrays):
        raise ValueError(f"{dir} must hold shards: shard_*.safetensors ({len(shards)}) or *_{stem}.npy ({len(arrays)})")
    return shards or arrays


def write_shard(path: Path, columns: Mapping[str, Tensor]) -> None:
    """Write the columns of a shard as safetensors, whole or not at all; equal columns give equal bytes."""
    with whole_file(path) as partial:
        save_file(dict(columns), partial)


def file_crc32(path: Path) -> int:
    """CRC-32 of a whole file, which is read a megabyte at a time. OSError: no regular file."""
    found, block = 0, memoryview(bytearray(_BLOCK_BYTES))
    with open_regular(path) as file:
        while size := file.readinto(block):  # type: ignore[attr-defined]
            found = zlib.crc32(block[:size], found)
    return found


def check_at_first_reading(path: Path, crc32: int | None) -> None:
    """Have a shard compared with its checksum when this process first reads values of it; None: with nothing."""
    key = path.absolute()
    _unread.pop(key, None)
    if crc32 is not None and _checked.get(key) != crc32:
        _unread[key] = crc32


def _check_content(path: Path) -> None:
    key = path.absolute()
    expected = _unread.get(key)
    if expected is None:
        return
    found = file_crc32(path)
    if found != expected:
        raise ValueError(
            f"{path}: CRC-32 of the file ({found:08x}) must be that of the manifest ({expected:08x}): it was changed since "
            "it was written"
        )
    _checked[key] = _unread.pop(key)


def read_column(path: Path | str, name: str) -> Tensor:
    """A column of a shard: acts [N, D] in its own dtype; others int64 [N], or float32.

    Args:
        path: a .safetensors shard, or the .npy file of any column of the shard.

    Raises:
        ValueError: no such column, a file of another form, one that was cut short, or one that has another checksum than the
            manifest of an :class:`~trix.superposition.dump.ActivationDump` says. OSError: no regular file.
    """
    path = Path(path)
    if path.suffix != ".npy":
        return column_rows(path, name, 0, None)
    array = load_npy(_npy_of(path, name), mmap=False)
    return torch.from_numpy(array.astype(np.int64, copy=False) if array.dtype.kind in "iu" else array)


def column_rows(path: Path | str, name: str, start: int, stop: int | None) -> Tensor:
    """Rows of a column, from start to before stop; no others are read. Errors as :func:`read_column`."""
    path = Path(path)
    if path.suffix == ".npy":
        array = np.array(load_npy(_npy_of(path, name))[start:stop])
        return torch.from_numpy(array.astype(np.int64, copy=False) if array.dtype.kind in "iu" else array)
    _column_info(path, name, _header(path))
    _check_content(path)
    try:
        with safe_open(path, framework="pt") as file:
            rows: Tensor = file.get_slice(name)[start:stop]
            return rows
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error


def num_rows(path: Path | str, name: str = "acts") -> int:
    """Tokens of a shard; its values are not read. Errors as :func:`read_column`."""
    path = Path(path)
    return (
        len(load_npy(_npy_of(path, name))) if path.suffix == ".npy" else _column_info(path, name, shard_columns(path)).shape[0]
    )


def shard_columns(path: Path) -> dict[str, ColumnInfo]:
    """What a safetensors shard holds; its values are not read.

    Raises:
        ValueError: a file of another form, or one that is shorter or longer than its header says. OSError: no regular file.
    """
    columns = _header(path)
    try:
        with safe_open(path, framework="pt"):  # compares the shapes with the bytes that are there
            return columns
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error


def _header(path: Path) -> dict[str, ColumnInfo]:
    """What a shard says that it holds; its length is compared, its shapes are not."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        if not 0 < length <= MAX_HEADER_BYTES:
            raise ValueError(f"{path}: header ({length} bytes) must be > 0 and <= {MAX_HEADER_BYTES} bytes: it is no shard")
        header = file.read(length)
    if len(header) < length:
        raise ValueError(f"{path} ({size} bytes) must hold its header of {length} bytes: the file was cut short")
    try:
        columns = {name: value for name, value in json.loads(header).items() if name != "__metadata__"}
        found = {name: ColumnInfo(str(value["dtype"]), tuple(map(int, value["shape"]))) for name, value in columns.items()}
        expected = _LENGTH_BYTES + length + max(int(value["data_offsets"][1]) for value in columns.values())
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: header must be that of a safetensors file: {error!r}") from error
    if size != expected:
        why = "cut short" if size < expected else "changed"
        raise ValueError(f"{path} ({size} bytes) must have the {expected} bytes that its header says: the file was {why}")
    return found


def _column_info(path: Path, name: str, columns: Mapping[str, ColumnInfo]) -> ColumnInfo:
    if name not in columns or not columns[name].shape:
        raise ValueError(f"{path}: columns ({', '.join(columns)}) must include {name}")
    return columns[name]


def _npy_of(path: Path, name: str) -> Path:
    prefix, _, _ = path.stem.rpartition("_")
    return path.with_name(f"{prefix}_{name}.npy")
