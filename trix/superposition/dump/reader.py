"""Dumps that are read again: in order, or shuffled in bounded memory.

N tokens, D width.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trix.superposition.backends.io_store import check_at_first_reading, column_rows, num_rows, read_column
from trix.superposition.dump.batching import in_batches
from trix.superposition.dump.manifest import check_shards, read_manifest, shard_path

Part = Literal["all", "training", "validation"]
HeldOut = float | NDArray[np.int64]
"""What is held out: a share of the documents, drawn with a seed, or the numbers of the documents."""

CHUNK_ROWS = 256
WINDOW_ROWS = 65536  # shuffled at once, 75 MB of bf16 at a width of 576


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
    rows_of = [num_rows(path) for path in act_files]
    pieces = (
        {"acts": column_rows(path, "acts", start, start + batch)}
        for path, rows in zip(act_files, rows_of, strict=True)
        for start in range(0, rows, batch)
    )
    return (part["acts"] for part in in_batches(pieces, batch, sum(rows_of)))


class ActivationDump:
    """A complete dump, whose shards are what its manifest says: files, sizes, columns, dtypes and shapes are compared first.

    The content of a shard is compared with the checksum of the manifest when a process first reads values of the shard; a
    ValueError then names it. Manifests from before there were checksums have none to compare with.

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
        for path, shard in zip(self.paths, self.manifest.shards, strict=True):
            check_at_first_reading(path, shard.crc32)

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

    def num_rows(self, part: Part = "all", held_out: HeldOut = 0.0, seed: int = 0) -> int:
        """Rows of a part; parts and errors as :meth:`chunks`."""
        return _num_rows(self.chunks(part, held_out, seed))

    def shuffled(
        self,
        batch_size: int,
        seed: int = 0,
        epoch: int = 0,
        start: int = 0,
        columns: Sequence[str] = ("acts",),
        part: Part = "all",
        held_out: HeldOut = 0.0,
    ) -> Iterator[dict[str, Tensor]]:
        """The rows of a part, each once, in an order drawn from (seed, epoch); only the last batch may be shorter.

        Chunks of at most 256 neighbouring rows are put in random order, and the rows of as many chunks as have 65536 rows are
        shuffled at a time. Dumps whose shards have the same tokens, as those of :func:`~trix.superposition.dump.dump_sites`,
        give the same order.

        Args:
            start: number of the first batch to give; those before it are not read, except in the window where it begins.
            columns: acts is given as float32, others as they are. part, held_out: as in :meth:`chunks`.

        Raises:
            ValueError: batch_size < 1, seed, epoch or start < 0, start above the number of batches, an unknown column, and as
                :meth:`chunks`.
        """
        if batch_size < 1 or min(seed, epoch) < 0:
            raise ValueError(f"batch_size ({batch_size}) must be >= 1, seed ({seed}) and epoch ({epoch}) >= 0")
        chunks = self.chunks(part, held_out, seed)
        num_rows = _num_rows(chunks)
        num_batches = -(-num_rows // batch_size)
        if not 0 <= start <= num_batches:
            raise ValueError(f"start ({start}) must be >= 0 and <= number of batches ({num_batches})")
        unknown = [name for name in columns if name not in self.manifest.columns]
        if unknown:
            raise ValueError(f"column ({unknown[0]!r}) must be one of {', '.join(self.manifest.columns)}")
        skip = start * batch_size
        return in_batches(self._windows(chunks, (seed, epoch), skip, columns), batch_size, max(num_rows - skip, 0))

    def _windows(
        self, chunks: NDArray[np.int64], key: tuple[int, int], skip: int, columns: Sequence[str]
    ) -> Iterator[dict[str, Tensor]]:
        """The rows window by window, without the first ``skip`` rows. All windows are views of one buffer."""
        chunks = chunks[np.random.default_rng(key).permutation(len(chunks))]
        end_of_chunk = np.cumsum(chunks[:, 2] - chunks[:, 1])
        buffer: dict[str, Tensor] = {}
        first, place, number = 0, 0, 0
        while first < len(chunks):
            stop = int(np.searchsorted(end_of_chunk, place + WINDOW_ROWS, side="right"))
            num_rows = int(end_of_chunk[stop - 1]) - place
            if skip < place + num_rows:
                self._fill(buffer, chunks[first:stop], np.random.default_rng((*key, number)), columns)
                yield {name: rows[max(skip - place, 0) : num_rows] for name, rows in buffer.items()}
            first, place, number = stop, place + num_rows, number + 1

    def _fill(
        self, buffer: dict[str, Tensor], chunks: NDArray[np.int64], generator: np.random.Generator, columns: Sequence[str]
    ) -> None:
        """Put the rows of the chunks into the head of the buffer, in random order."""
        place_N = torch.from_numpy(generator.permutation(_num_rows(chunks)))
        for name in columns:
            first = 0
            for shard, start, stop in chunks.tolist():
                part = column_rows(self.paths[shard], name, start, stop)
                if name not in buffer:
                    buffer[name] = part.new_empty((min(WINDOW_ROWS, len(self)), *part.shape[1:]))
                buffer[name][place_N[first : first + len(part)]] = part
                first += len(part)

    def chunks(self, part: Part = "all", held_out: HeldOut = 0.0, seed: int = 0) -> NDArray[np.int64]:
        """At most 256 neighbouring rows each, in the order in which they were written: int64 [chunks, 3], each of the number of
        a shard, the first row and the row after the last.

        Args:
            part: all rows; those of the documents that are held out for validation; or those of all other documents. So no
                document is in both parts.
            held_out: share of the documents with rows, drawn with the seed; or the numbers of the documents.

        Raises:
            ValueError: a share outside [0, 1).
        """
        if isinstance(held_out, float | int) and not 0 <= held_out < 1:
            raise ValueError(f"held_out ({held_out}) must be >= 0 and < 1")
        if part == "all":
            pieces = np.array([(index, 0, shard.tokens) for index, shard in enumerate(self.manifest.shards)], dtype=np.int64)
        else:
            documents = self.held_out_documents(held_out, seed)
            pieces = np.concatenate(
                [
                    _pieces(index, start_R, document_R, documents, part == "validation")
                    for index, (start_R, document_R) in enumerate(self._runs)
                ]
            )
        num_chunks = -(-(pieces[:, 2] - pieces[:, 1]) // CHUNK_ROWS)
        shard, start, stop = np.repeat(pieces, num_chunks, axis=0).T
        number = np.arange(len(shard)) - np.repeat(num_chunks.cumsum() - num_chunks, num_chunks)
        first = start + number * CHUNK_ROWS
        return np.stack([shard, first, np.minimum(first + CHUNK_ROWS, stop)], axis=1)

    def held_out_documents(self, held_out: HeldOut, seed: int = 0) -> NDArray[np.int64]:
        """The numbers of the documents that are held out, as :meth:`chunks` says."""
        if not isinstance(held_out, float | int):
            return held_out
        documents = np.unique(np.concatenate([document_R for _, document_R in self._runs]))
        return np.random.default_rng(seed).permutation(documents)[: round(held_out * len(documents))]

    @cached_property
    def _runs(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """For each shard the runs of rows of one document: their first rows, and last the number of rows; their documents."""
        found = []
        for path in self.paths:
            document_N = read_column(path, "titleidx").numpy()
            start_R = np.flatnonzero(np.diff(document_N, prepend=document_N[0] - 1))
            found.append((np.append(start_R, len(document_N)), document_N[start_R]))
        return found


def _pieces(
    shard: int, start_R: NDArray[np.int64], document_R: NDArray[np.int64], held_out: NDArray[np.int64], of_held_out: bool
) -> NDArray[np.int64]:
    """The longest pieces of a shard whose documents are all held out, or all not: int64 [pieces, 3] as of chunks."""
    is_in_R = np.isin(document_R, held_out) == of_held_out
    border = np.diff(is_in_R.astype(np.int8), prepend=0, append=0)
    first, stop = start_R[np.flatnonzero(border == 1)], start_R[np.flatnonzero(border == -1)]
    return np.stack([np.full_like(first, shard), first, stop], axis=1)


def _num_rows(chunks: NDArray[np.int64]) -> int:
    return int((chunks[:, 2] - chunks[:, 1]).sum())
