"""The tensors in the safetensors files of a folder, each read when it is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (gives numpy bfloat16, which safetensors asks for)
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.settings import read_json_object
from trix.regular_files import check_regular, is_plain_name

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"


class StoredTensor(NamedTuple):
    """dtype: as safetensors names it, U8 or BF16."""

    path: Path
    dtype: str
    shape: tuple[int, ...]


class SafetensorsFolder:
    """model.safetensors, or the shards that model.safetensors.index.json names; they lie in the folder itself.

    safetensors compares every header with the bytes that are there. Raises CheckpointError for a file that is missing or
    damaged, and for an index that names a path, or a tensor that its shard does not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stored: dict[str, StoredTensor] = {}
        self.files: tuple[Path, ...]
        if (folder / WEIGHTS_FILE).exists() or not (folder / INDEX_FILE).exists():
            self.files = (folder / WEIGHTS_FILE,)
            self.stored = _header(self.files[0])
        else:
            self._read_index(folder / INDEX_FILE)

    def _read_index(self, index: Path) -> None:
        shard_of = read_json_object(index).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise CheckpointError(f"weight_map of {index} must give the name of a file for each tensor")
        shards = sorted(set(shard_of.values()))
        for shard in shards:
            if not is_plain_name(shard):
                raise CheckpointError(f"weight_map of {index} ({shard!r:.80}) must name files of its own folder")
        headers = {shard: _header(index.parent / shard) for shard in shards}
        for name, shard in shard_of.items():
            if name not in headers[shard]:
                raise CheckpointError(f"{index.parent / shard} must hold {name!r:.80}, as {index.name} says")
            self.stored[name] = headers[shard][name]
        self.files = (index, *(index.parent / shard for shard in shards))

    def read(self, name: str) -> NDArray[Any]:
        """The whole tensor, in its own dtype."""
        with _opened(self.stored[name].path) as file:
            values: NDArray[Any] = file.get_tensor(name)
            return values

    def rows(self, name: str, num_rows: int) -> Iterator[NDArray[Any]]:
        """The tensor in its own dtype, in parts of num_rows rows."""
        stored = self.stored[name]
        with _opened(stored.path) as file:
            part = file.get_slice(name)
            for start in range(0, stored.shape[0], num_rows):
                yield part[start : min(start + num_rows, stored.shape[0])]


def _header(path: Path) -> dict[str, StoredTensor]:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        return {name: StoredTensor(path, str(part.get_dtype()), tuple(part.get_shape())) for name, part in slices.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        check_regular(path)
        with safe_open(path, framework="numpy") as file:
            yield file
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise CheckpointError(f"{path} must be a whole safetensors file: {error}") from error
