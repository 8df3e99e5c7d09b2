"""Dumps that are read again: in order, or shuffled in bounded memory.

N tokens, D width.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trix.superposition.backends.io_store import column_rows, num_rows, read_column
from trix.superposition.dump.manifest import check_shards, read_manifest, shard_path

Part = Literal["all", "training", "validation"]

CHUNK_ROWS = 256
WINDOW_CHUNKS = 256  # 65536 tokens are shuffled at once, 75 MB of bf16 at a width of 576


def build_offsets(act_files: Sequence[Path | str]) -> NDArray[np.int64]:
    """Number of each file's first row among the rows of all, and last the number of all rows: int64 [files + 1].

    Raises:
        ValueError: as :func:`~trix.superposition.backends.io_store.read_column`.
    """
    return np.cumsum([0, *(num_rows(path) for path in act_files)], dtype=np.int64)


def stream_shards(act_files: Sequence[Path | str], batch: int = 16384) -> Iterator[Tensor]:
    """The activations of all files in order, float32 [<= batch, D]; only the last batch may be shorter.

    Raises:
        ValueError: batch < 1, and as :func:`~trix.superposition.backends.io_store.read_column`.
    """
    if batch < 1:
        raise ValueError(f"batch ({batch}) must be >= 1")
    return _in_order(act_files, batch)


def _in_order(act_files: Sequence[Path | str], batch: int) -> Iterator[Tensor]:
    parts: list[Tensor] = []
    missing = batch
    for path in act_files:
        rows, start = num_rows(path), 0
        while start < rows:
            stop = min(start + missing, rows)
            parts.append(column_rows(path, "acts", start, stop).float())
            missing -= stop - start
            start = stop
            if missing == 0:
                yield torch.cat(parts)
                parts, missing = [], batch
    if parts:
        yield torch.cat(parts)


class ActivationDump:
    """A complete dump, whose shards are what its manifest says: files, sizes, columns, dtypes and shapes are compared first.

    Attributes:
        manifest: see :class:`~trix.superposition.dump.manifest.Manifest`. paths: the shards, in order.

    Raises:
        ValueError: a dump that was interrupted, or shards or a manifest that do not fit. OSError: a file is missing.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest.cursor is not None:
            written = self.manifest.tokens
            raise ValueError(f"{folder}: the dump ({written} tokens so far) must be complete: dump to this folder again")
        check_shards(self.folder, self.manifest)
        self.paths = [shard_path(self.folder, index) for index in range(len(self.manifest.shards))]

    def __len__(self) -> int:
        return self.manifest.tokens

    def column(self, name: str) -> Tensor:
        """A column of all tokens at once: labels, tokids, titleidx, position, tile (int64 [N]) or score (float32 [N]).

        Raises:
            ValueError: acts, which need not fit into memory, or a column that the dump lacks.
        """
        available = [column for column in self.manifest.columns if column != "acts"]
        if name not in available:
            raise ValueError(f"column ({name!r}) must be one of {', '.join(available)}")
        return torch.cat([read_column(path, name) for path in self.paths])

    def num_rows(self, part: Part = "all", held_out: float = 0.0, seed: int = 0) -> int:
        """Rows of a part, as :meth:`shuffled` splits them.

        Raises:
            ValueError: held_out out of [0, 1).
        """
        chunks = self.chunks(part, held_out, seed)
        return int((chunks[:, 2] - chunks[:, 1]).sum())

    def shuffled(
        self,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        columns: Sequence[str] = ("acts",),
        part: Part = "all",
        held_out: float = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """The rows of all shards, each once, in an order drawn from (seed, epoch); only the last batch may be shorter.

        Chunks of 256 neighbouring rows are put in random order, and the rows of 256 chunks at a time are shuffled. Dumps whose
        shards have the same tokens, as those of :func:`~trix.superposition.dump.dump_sites`, give the same order.

        Args:
            start: number of the first batch to give; those before it are not read, except in the window where it begins.
            columns: acts is given as float32, others as they are. part: all rows, or those of the chunks that are held out for
                validation, the share ``held_out`` of all chunks, drawn with the seed; or those of the others.

        Raises:
            ValueError: batch_size < 1, seed, epoch or start < 0, start above the number of batches, an unknown column, held_out
                out of [0, 1).
        """
        if batch_size < 1 or min(seed, epoch) < 0:
            raise ValueError(f"batch_size ({batch_size}) must be >= 1, seed ({seed}) and epoch ({epoch}) >= 0")
        chunks = self.chunks(part, held_out, seed)
        num_batches = -(-int((chunks[:, 2] - chunks[:, 1]).sum()) // batch_size)
        if not 0 <= start <= num_batches:
            raise ValueError(f"start ({start}) must be >= 0 and <= number of batches ({num_batches})")
        unknown = [name for name in columns if name not in self.manifest.columns]
        if unknown:
            raise ValueError(f"column ({unknown[0]!r}) must be one of {', '.join(self.manifest.columns)}")
        return self._batches(chunks, batch_size, (seed, epoch), start, columns)

    def _batches(
        self, chunks: NDArray[np.int64], batch_size: int, key: tuple[int, int], start: int, columns: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        order = np.random.default_rng(key).permutation(len(chunks))
        windows = [chunks[order[first : first + WINDOW_CHUNKS]] for first in range(0, len(order), WINDOW_CHUNKS)]
        skip, place = start * batch_size, 0
        parts: list[dict[str, Tensor]] = []
        missing = batch_size
        for number, window in enumerate(windows):
            rows = _num_rows(window)
            at, place = max(skip - place, 0), place + rows
            if at >= rows:
                continue
            found = self._window(window, np.random.default_rng((*key, number)), columns)
            while at < rows:
                stop = min(at + missing, rows)
                parts.append({name: _as_given(name, value[at:stop]) for name, value in found.items()})
                missing -= stop - at
                at = stop
                if missing == 0:
                    yield _joined(parts)
                    parts, missing = [], batch_size
            del found  # or two windows would be held at once
        if parts:
            yield _joined(parts)

    def chunks(self, part: Part = "all", held_out: float = 0.0, seed: int = 0) -> NDArray[np.int64]:
        """The chunks of a part in the order in which they were written, as :meth:`shuffled` splits them: int64 [chunks, 3],
        each of the number of a shard, the first row and the row after the last.

        Raises:
            ValueError: held_out out of [0, 1).
        """
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out ({held_out}) must be >= 0 and < 1")
        chunks = np.array(
            [
                (index, first, min(first + CHUNK_ROWS, shard.tokens))
                for index, shard in enumerate(self.manifest.shards)
                for first in range(0, shard.tokens, CHUNK_ROWS)
            ],
            dtype=np.int64,
        )
        if part == "all":
            return chunks
        is_held_out = np.zeros(len(chunks), dtype=bool)
        is_held_out[np.random.default_rng(seed).permutation(len(chunks))[: round(held_out * len(chunks))]] = True
        return chunks[is_held_out] if part == "validation" else chunks[~is_held_out]

    def _window(self, chunks: NDArray[np.int64], generator: np.random.Generator, columns: Sequence[str]) -> dict[str, Tensor]:
        place = torch.from_numpy(generator.permutation(_num_rows(chunks)))
        found: dict[str, Tensor] = {}
        for name in columns:
            first = 0
            for shard, start, stop in chunks.tolist():
                part = column_rows(self.paths[shard], name, start, stop)
                if name not in found:
                    found[name] = part.new_empty((len(place), *part.shape[1:]))
                found[name][place[first : first + len(part)]] = part
                first += len(part)
        return found


def _num_rows(chunks: NDArray[np.int64]) -> int:
    return int((chunks[:, 2] - chunks[:, 1]).sum())


def _as_given(name: str, value: Tensor) -> Tensor:
    """A copy: a view would keep the whole window."""
    return value.to(torch.float32, copy=True) if name == "acts" else value.clone()


def _joined(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
