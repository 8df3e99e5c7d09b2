"""The header of a GGUF file: settings, and where each tensor is.

The package gguf has a reader, too. It makes several arrays of each token of the vocabulary, and trusts the number of values
that a list claims. This one skips lists, and stops where the file ends.

Source: ggml/docs/gguf.md, versions 2 and 3.
"""

import mmap
import struct
from pathlib import Path
from typing import Any, NamedTuple

from ort_ops.ternary_models.errors import CheckpointError
from trix.regular_files import open_regular

MAGIC, VERSIONS, DEFAULT_ALIGNMENT = b"GGUF", (2, 3), 32
MAX_FIELDS = 10_000_000  # beyond those of any vocabulary
MAX_DIMENSIONS = 4
MAX_NAME_BYTES, MAX_TEXT_BYTES = 2**16, 2**24
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
Value = int | float | bool | str


class GgufTensor(NamedTuple):
    """kind: ggml's number of its type. shape: rows first. offset: in bytes from the start of the file."""

    kind: int
    shape: tuple[int, ...]
    offset: int


class GgufHeader(NamedTuple):
    """values: the settings that are no lists. file_bytes: the size of the file."""

    values: dict[str, Value]
    tensors: dict[str, GgufTensor]
    file_bytes: int


def read_header(path: Path) -> GgufHeader:
    """Read the header of a GGUF file of little-endian numbers.

    Raises:
        CheckpointError: no regular file, another format or version, a header that is cut off, or a name that occurs twice.
    """
    try:
        with open_regular(path) as file:
            magic = file.read(len(MAGIC))
            if magic != MAGIC:
                raise CheckpointError(f"{path}: first bytes ({magic!r}) must be {MAGIC!r}, as in a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Walk(content, path).header()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error


class _Walk:
    """Through the fields of the header, from its start to its end."""

    def __init__(self, content: mmap.mmap, path: Path) -> None:
        self._content, self._path = content, path
        self._place, self._num_fields = len(MAGIC), 0

    def header(self) -> GgufHeader:
        version = self._scalar("I")
        if version not in VERSIONS:
            raise CheckpointError(f"{self._path}: GGUF version ({version}) must be {' or '.join(map(str, VERSIONS))}")
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        values: dict[str, Value] = {}
        for _ in range(num_values):
            name = self._text(MAX_NAME_BYTES)
            value = self._value(self._scalar("I"))
            if name in values:
                raise CheckpointError(f"{self._path}: {name!r:.80} must occur once in the header")
            if value is not None:
                values[name] = value
        found: dict[str, GgufTensor] = {}
        for _ in range(num_tensors):
            name = self._text(MAX_NAME_BYTES)
            if name in found:
                raise CheckpointError(f"{self._path}: tensor {name!r:.80} must occur once in the header")
            found[name] = self._tensor()
        alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_NAME_BYTES:
            raise CheckpointError(f"{self._path}: general.alignment ({alignment!r:.40}) must be from 1 to {MAX_NAME_BYTES}")
        start = -(-self._place // alignment) * alignment
        tensors = {name: tensor._replace(offset=start + tensor.offset) for name, tensor in found.items()}
        return GgufHeader(values, tensors, len(self._content))

    def _tensor(self) -> GgufTensor:
        num_dimensions = self._scalar("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise CheckpointError(f"{self._path}: dimensions of a tensor ({num_dimensions}) must be from 1 to {MAX_DIMENSIONS}")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        return GgufTensor(self._scalar("I"), shape, self._scalar("Q"))

    def _scalar(self, kind: str) -> Any:
        self._num_fields += 1
        if self._num_fields > MAX_FIELDS:
            raise CheckpointError(f"{self._path}: fields of the header must be <= {MAX_FIELDS}")
        start = self._place
        self._advance(struct.calcsize(f"<{kind}"))
        return struct.unpack_from(f"<{kind}", self._content, start)[0]

    def _text(self, limit: int) -> str:
        length = self._scalar("Q")
        if length > limit:
            raise CheckpointError(f"{self._path}: length of a text ({length}) must be <= {limit}")
        start = self._place
        self._advance(length)
        return self._content[start : self._place].decode("utf-8", "replace")

    def _advance(self, num_bytes: int) -> None:
        if num_bytes > len(self._content) - self._place:
            raise CheckpointError(f"{self._path} must hold its whole header: the file is cut off or damaged")
        self._place += num_bytes

    def _value(self, kind: int) -> Value | None:
        if kind == _TEXT:
            return self._text(MAX_TEXT_BYTES)
        if kind == _LIST:
            self._skip_list()
            return None
        if kind not in _SCALARS:
            raise CheckpointError(f"{self._path}: type of a value ({kind}) must be one of GGUF's")
        return self._scalar(_SCALARS[kind])

    def _skip_list(self) -> None:
        kind, number = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            self._advance(number * struct.calcsize(f"<{_SCALARS[kind]}"))
        elif kind == _TEXT:
            for _ in range(number):
                self._advance(self._scalar("Q"))
        else:
            raise CheckpointError(f"{self._path}: type of the values of a list ({kind}) must be a number or a text")
