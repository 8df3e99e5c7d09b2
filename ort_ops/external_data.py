"""Weights of an ONNX file that lie in a second file next to it: checked, named, and removed when no longer needed.

The checks need numpy alone: they read the fields of the protobuf message that matter, before onnxruntime opens the file, which
follows what it says. A location is a plain name of a regular file in the model's own folder; no range goes beyond that file,
and all ranges together are not more than it.
"""

import math
import mmap
import re
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from trix.regular_files import is_plain_name, open_regular
from trix.whole_file import remove_unless_used

MARK = b"location"  # a file without these bytes has no external data
MAX_FIELDS = 10_000_000  # beyond those of any model: each takes a microsecond. Packed numbers count as fields do
MAX_DIMS = 64  # beyond those of any tensor
MAX_DEPTH = 50
INLINE_BYTES = 1024  # smaller tensors stay in the model: onnxruntime needs the values of shapes when it loads it
ALIGNMENT = 4096  # so that a tensor can be mapped into memory
KEYS = ("location", "offset", "length", "checksum")
DATA_SUFFIX, DIGEST_LENGTH = ".data", 12

# Bits of an element by ONNX's number of its type.
_BITS = {1: 32, 2: 8, 3: 8, 4: 16, 5: 16, 6: 32, 7: 64, 9: 8, 10: 16, 11: 64, 12: 32, 13: 64, 14: 64, 15: 128, 16: 16}
_BITS |= {17: 8, 18: 8, 19: 8, 20: 8, 21: 4, 22: 4, 23: 4, 24: 8}

# Which field of a message holds messages of which kind, down to the tensors.
_MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_DIMS, _TYPE, _NAME, _EXTERNAL, _PLACE = 1, 2, 8, 13, 14
_IS_EXTERNAL = 1


@dataclass(frozen=True)
class ExternalTensor:
    """Where the bytes of a tensor are."""

    name: str
    location: str
    offset: int
    length: int


@dataclass(frozen=True)
class ExternalData:
    """The tensors of a model that lie in other files, and the sizes of these files by their names."""

    tensors: tuple[ExternalTensor, ...] = ()
    file_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        return sum(self.file_bytes.values())


def data_path(model: Path, digest: str) -> Path:
    """Where the external data of a model goes that is written here, for the hexadecimal digest of its bytes.

    A model names its data by the content, so it never reads what was written for another one.
    """
    return model.with_name(f"{model.name}.{digest[:DIGEST_LENGTH]}{DATA_SUFFIX}")


def remove_old_data(model: Path) -> None:
    """Remove the data files that were written here for the model's former content, or by a writer that was killed.

    The data that the model names stays, and what a live writer is about to name. What cannot be removed stays, too.
    """
    pattern = re.compile(rf"{re.escape(model.name)}\.[0-9a-f]{{{DIGEST_LENGTH}}}{re.escape(DATA_SUFFIX)}")

    def is_used(data: Path) -> bool:
        try:
            return data.name in check_external_data(model).file_bytes
        except (OSError, ValueError):
            return True

    with suppress(OSError):
        for data in [path for path in model.parent.iterdir() if pattern.fullmatch(path.name)]:
            remove_unless_used(data, partial(is_used, data))


def check_external_data(model: Path) -> ExternalData:
    """What the model says of external data, if it is safe to follow.

    Raises:
        OSError: the model cannot be read. ValueError: it is damaged, or says something else than the module's rules.
    """
    with open_regular(model) as file:
        if not file.seek(0, 2):
            return ExternalData()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(MARK) < 0:
                return ExternalData()
            tensors, problem = _tensors_or_problem(content)
    if problem is not None:
        raise ValueError(problem)
    sizes = {location: _data_size(model, location) for location in dict.fromkeys(tensor.location for tensor in tensors)}
    claimed: Counter[str] = Counter()
    for tensor in tensors:
        size = sizes[tensor.location]
        if tensor.offset + tensor.length > size:
            place = f"offset ({tensor.offset}) + length ({tensor.length}) of tensor {tensor.name!r:.80}"
            raise ValueError(f"external data {tensor.location}: {place} must be <= its size ({size})")
        claimed[tensor.location] += tensor.length
    for location, num_bytes in claimed.items():
        if num_bytes > sizes[location]:
            raise ValueError(
                f"external data {location}: lengths together ({num_bytes}) must be <= its size ({sizes[location]})"
            )
    return ExternalData(tensors, sizes)


def _tensors_or_problem(content: mmap.mmap) -> tuple[tuple[ExternalTensor, ...], str | None]:
    """An exception that came out of here would keep parts of the file open, which is about to be closed."""
    with memoryview(content) as view:
        try:
            return tuple(_Walk().external_tensors(view)), None
        except ValueError as error:
            return (), str(error)


def _data_size(model: Path, location: str) -> int:
    if not is_plain_name(location):
        raise ValueError(f"location of external data ({location!r:.80}) must be the name of a file in the model's folder")
    path = model.parent / location
    try:
        if path.resolve().parent != model.parent.resolve():
            raise ValueError(f"external data {location} must lie in the model's folder, it is a link to another one")
        status = path.stat()
    except OSError as error:
        raise ValueError(f"external data {location} must lie next to the model: {error.strerror or error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"external data {location} must be a regular file")
    return status.st_size


class _Walk:
    """Through the fields of a protobuf message, as far as its tensors."""

    def __init__(self) -> None:
        self._num_fields = 0

    def external_tensors(self, content: memoryview, kind: str = "model", depth: int = 0) -> Iterator[ExternalTensor]:
        if kind == "tensor":
            yield from self._tensor(content)
            return
        if depth > MAX_DEPTH:
            raise ValueError(f"graphs in graphs must be at most {MAX_DEPTH} messages deep")
        inner = _MESSAGES[kind]
        for number, value in self._fields(content):
            if number in inner and isinstance(value, memoryview):
                yield from self.external_tensors(value, inner[number], depth + 1)

    def _tensor(self, content: memoryview) -> Iterator[ExternalTensor]:
        dims: list[int] = []
        element, place, name, entries = 0, 0, "", {}
        for number, value in self._fields(content):
            if isinstance(value, int):
                dims += [value] if number == _DIMS else []
                element = value if number == _TYPE else element
                place = value if number == _PLACE else place
            elif number == _DIMS:
                dims += self._packed(value)
            elif number == _NAME:
                name = _text(value)
            elif number == _EXTERNAL:
                pair = {number: _text(part) for number, part in self._fields(value) if isinstance(part, memoryview)}
                key = pair.get(1, "")
                if key not in KEYS or key in entries:
                    raise ValueError(f"key of external data ({key!r:.40}) must be one of {', '.join(KEYS)}, each once")
                entries[key] = pair.get(2, "")
        if place == _IS_EXTERNAL or entries:
            yield _external_tensor(name, dims, element, entries)

    def _packed(self, content: memoryview) -> list[int]:
        values, place = [], 0
        while place < len(content):
            self._count_field()
            value, place = _varint(content, place)
            values.append(value)
        return values

    def _count_field(self) -> None:
        self._num_fields += 1
        if self._num_fields > MAX_FIELDS:
            raise ValueError(f"number of fields of the file must be <= {MAX_FIELDS}")

    def _fields(self, content: memoryview) -> Iterator[tuple[int, int | memoryview]]:
        """Number and value of each field; those of a fixed size have the value 0, as no one needs them."""
        place = 0
        while place < len(content):
            self._count_field()
            tag, place = _varint(content, place)
            number, wire_type = tag >> 3, tag & 7
            if wire_type == 0:
                value, place = _varint(content, place)
                yield number, value
                continue
            length, place = _varint(content, place) if wire_type == 2 else ({1: 8, 5: 4}.get(wire_type, -1), place)
            if length < 0 or place + length > len(content):
                raise ValueError("not an ONNX file, or a damaged one")
            yield number, content[place : place + length] if wire_type == 2 else 0
            place += length


def _varint(content: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(content):
            break
        byte = content[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (2**64 - 1), place
    raise ValueError("not an ONNX file, or a damaged one")


def _text(content: memoryview) -> str:
    return str(content, "utf-8", "replace")


def _external_tensor(name: str, dims: list[int], element: int, entries: Mapping[str, str]) -> ExternalTensor:
    if len(dims) > MAX_DIMS:
        raise ValueError(f"number of dimensions of tensor {name!r:.80} ({len(dims)}) must be <= {MAX_DIMS}")
    num_elements = math.prod(dims)
    if element not in _BITS or num_elements >= 2**63:
        raise ValueError(f"tensor {name!r:.80} (element type {element}, shape {dims!r:.40}) must be of a type of a fixed size")
    num_bytes = (num_elements * _BITS[element] + 7) // 8
    offset, length = _number(name, "offset", entries.get("offset", "0")), entries.get("length")
    if length is not None and _number(name, "length", length) != num_bytes:
        raise ValueError(
            f"length ({length!r:.40}) of tensor {name!r:.80} must be that of its shape {dims!r:.40} ({num_bytes} bytes)"
        )
    return ExternalTensor(name, entries.get("location", ""), offset, num_bytes)


def _number(name: str, key: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise ValueError(f"{key} ({text!r:.40}) of tensor {name!r:.80} must be a whole number")
    return int(text)
