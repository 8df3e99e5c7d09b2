"""Rows to shards of a fixed number of tokens, such that a dump that was killed goes on where its last whole shard ends."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from trix.superposition.backends.base_model import Site
from trix.superposition.backends.io_store import file_crc32, write_shard
from trix.superposition.dump.batch_rows import BatchRows
from trix.superposition.dump.manifest import (
    MANIFEST_FILE,
    MAX_NAMED_ROWS,
    TOKEN_COLUMNS,
    Cursor,
    Dropped,
    Identity,
    Manifest,
    NotFinite,
    ShardRecord,
    check_identity,
    check_shards,
    read_manifest,
    shard_path,
)

MAX_SHARDS = 10**5  # names of five digits


@dataclass
class _Folder:
    """One site's folder: the shard that is being filled, and the records of those that are written.

    capacity: most rows that a shard will have.
    """

    path: Path
    identity: Identity
    capacity: int
    d_model: int = 0
    columns: list[str] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    shards: list[ShardRecord] = field(default_factory=list)

    def put(self, rows: Mapping[str, Tensor], place: int) -> None:
        self.d_model = rows["acts"].shape[1]
        self.columns = ["acts", *TOKEN_COLUMNS, *(name for name in rows if name not in ("acts", *TOKEN_COLUMNS))]
        for name, column in rows.items():
            if name not in self.buffers:
                self.buffers[name] = torch.empty((self.capacity, *column.shape[1:]), dtype=column.dtype)
            self.buffers[name][place : place + len(column)] = column

    def write(self, fill: int) -> None:
        path = shard_path(self.path, len(self.shards))
        write_shard(path, {name: buffer[:fill] for name, buffer in self.buffers.items()})
        self.shards.append(ShardRecord(tokens=fill, bytes=path.stat().st_size, crc32=file_crc32(path)))


class ShardWriter:
    """The folders of one dump, one for each site, whose rows belong to the same tokens.

    Before the first :meth:`add` it is where the folders' manifests say; ``batch`` is the next one to add. A shard and then the
    manifest that names it are each written whole, so a dump can be killed anywhere; what it then writes again is the same.

    Args:
        folders: of each site. identities: of each site. documents, empty_documents: for the manifests. tokens: of all
            texts, of which some may be left out. strict: a value that is NaN or infinite is an error.

    Raises:
        ValueError: a folder holds another dump, shards that its manifest does not name, or damaged ones.
    """

    def __init__(
        self,
        folders: Mapping[Site, Path],
        identities: Mapping[Site, Identity],
        documents: int,
        empty_documents: int,
        tokens: int,
        strict: bool,
    ) -> None:
        self._documents, self._empty_documents, self._strict = documents, empty_documents, strict
        self._shard_tokens = next(iter(identities.values())).settings.shard_tokens
        capacity = min(self._shard_tokens, tokens)
        self._folders = {site: _Folder(path, identities[site], capacity) for site, path in folders.items()}
        self.batch = self._skip = self._fill = 0
        self._dropped, self._not_finite = Dropped(), list[NotFinite]()
        self.is_complete = False
        self._resume([_found(folder) for folder in self._folders.values()])

    def _resume(self, found: Sequence[Manifest | None]) -> None:
        known = [manifest for manifest in found if manifest is not None]
        if len(known) < len(found):
            return
        self.is_complete = all(manifest.cursor is None for manifest in known)
        unfinished = [manifest for manifest in known if manifest.cursor is not None]
        if not unfinished:
            return
        least = min(unfinished, key=lambda manifest: len(manifest.shards))
        assert least.cursor is not None
        self.batch, self._skip = least.cursor.batch, least.cursor.rows
        self._dropped, self._not_finite = least.dropped, list(least.not_finite)
        for folder, manifest in zip(self._folders.values(), known, strict=True):
            folder.shards = manifest.shards[: len(least.shards)]
            folder.d_model, folder.columns = manifest.d_model, manifest.columns

    @property
    def _num_written(self) -> int:
        return len(next(iter(self._folders.values())).shards)

    def add(self, rows: BatchRows) -> None:
        """The rows of the next batch.

        Raises:
            ValueError: a token is NaN or infinite, with ``strict``; more than 100,000 shards.
            OSError: a shard cannot be written.
        """
        skip, self._skip = self._skip, 0
        first = self._num_written * self._shard_tokens + self._fill - skip  # number of the batch's first row in the dump
        broken = [self._named(first + row, document, position) for row, document, position in rows.not_finite]
        if broken and self._strict:
            raise ValueError(f"activations at {_where(broken[0])} must be finite")
        start = skip
        while start < len(rows):
            stop = min(start + self._shard_tokens - self._fill, len(rows))
            for site, part in rows.part(start, stop).items():
                self._folders[site].put(part, self._fill)
            self._fill += stop - start
            start = stop
            if self._fill == self._shard_tokens:
                self._write_shards(Cursor(batch=self.batch, rows=stop))
        self._dropped = self._dropped.plus(rows.dropped)
        self._not_finite = (self._not_finite + broken)[:MAX_NAMED_ROWS]
        self.batch += 1

    def finish(self) -> None:
        """Write the last shard, and that the dump is complete.

        Raises:
            ValueError: no token was kept. OSError: a file cannot be written.
        """
        dropped = self._dropped
        if self._num_written == 0 and self._fill == 0:
            counts = ", ".join(f"{name} {number}" for name, number in dropped)
            raise ValueError(f"tokens kept (0 of {self._documents} texts) must be >= 1; left out: {counts}")
        self._write_shards(None)
        if dropped.not_finite:
            warnings.warn(
                f"tokens left out as NaN or infinite: {dropped.not_finite}, the first at {_where(self._not_finite[0])}; "
                f"the manifest names up to {MAX_NAMED_ROWS}",
                stacklevel=4,
            )

    def _write_shards(self, cursor: Cursor | None) -> None:
        if self._num_written == MAX_SHARDS:
            raise ValueError(
                f"number of shards ({MAX_SHARDS + 1}) must be <= {MAX_SHARDS}: raise shard_tokens ({self._shard_tokens})"
            )
        if self._fill:
            for folder in self._folders.values():
                folder.write(self._fill)
            self._fill = 0
        for folder in self._folders.values():
            self._manifest(folder, cursor).write(folder.path)

    def _manifest(self, folder: _Folder, cursor: Cursor | None) -> Manifest:
        return Manifest(
            identity=folder.identity,
            d_model=folder.d_model,
            columns=folder.columns,
            documents=self._documents,
            empty_documents=self._empty_documents,
            dropped=self._dropped,
            not_finite=self._not_finite,
            tokens=sum(shard.tokens for shard in folder.shards),
            shards=folder.shards,
            cursor=cursor,
        )

    def _named(self, row: int, document: int, position: int) -> NotFinite:
        shard, within = divmod(row, self._shard_tokens)
        return NotFinite(shard=shard, row=within, document=document, position=position)


def _found(folder: _Folder) -> Manifest | None:
    """The manifest of a folder that already holds a part of this dump."""
    if not (folder.path / MANIFEST_FILE).exists():
        manifest = None
    else:
        manifest = read_manifest(folder.path)
        check_identity(folder.path, manifest.identity, folder.identity)
        check_shards(folder.path, manifest)
    num_named = 0 if manifest is None else len(manifest.shards)
    expected = {shard_path(folder.path, index) for index in range(num_named + 1)}  # one more where the dump was killed
    foreign = sorted(set(folder.path.glob("shard_*")) - expected)
    if foreign:
        raise ValueError(f"{folder.path}: {foreign[0].name} must be one of the {num_named} shards of the dump that is there")
    return manifest


def _where(row: NotFinite) -> str:
    return f"shard {row.shard}, row {row.row} (document {row.document}, position {row.position})"
