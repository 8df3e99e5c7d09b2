"""What a folder of activations says of itself, in ``manifest.json``, and what it must agree with."""

import json
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trix.regular_files import read_regular
from trix.superposition.backends.io_store import shard_columns
from trix.superposition.config import DTypeName
from trix.whole_file import write_whole

MANIFEST_FILE = "manifest.json"
MAX_MANIFEST_BYTES = 2**26
SAFETENSORS_DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}
TOKEN_COLUMNS = {"labels": "I64", "tokids": "I64", "titleidx": "I64", "position": "I64"}
MODEL_COLUMNS = {"tile": "I64", "score": "F32"}
MAX_NAMED_ROWS = 100


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DumpSettings(_Record):
    """What the rows of a dump depend on besides model, texts and site; see :class:`~trix.superposition.DumpConfig`.

    sites: all that were read at once; a token that is left out at one of them is left out at all.
    """

    max_len: int
    batch_size: int
    shard_tokens: int = Field(ge=1)
    drop_sinks: bool
    sites: list[str]


class Identity(_Record):
    """What one dump is of: a dump that goes on must agree in all of it.

    trix: version. model, data: digests.
    """

    trix: str
    model: str
    data: str
    layer: int
    site: str
    dtype: DTypeName
    settings: DumpSettings


class Dropped(_Record):
    """Positions that were read and left out, each counted by the first reason that holds.

    padding: no token. first: the first of a text, an attention sink. not_finite: NaN or infinite at a site. norm: more than 10
    times the median of the batch at a site.
    """

    padding: int = 0
    first: int = 0
    not_finite: int = 0
    norm: int = 0

    def plus(self, other: "Dropped") -> "Dropped":
        return Dropped(**{name: getattr(self, name) + getattr(other, name) for name in Dropped.model_fields})


class NotFinite(_Record):
    """A token that was left out as NaN or infinite. shard, row: where it would have stood."""

    shard: int
    row: int
    document: int
    position: int


class ShardRecord(_Record):
    """tokens: rows. bytes: size of the file. crc32: its CRC-32; None in manifests from before there were checksums."""

    tokens: int = Field(ge=1)
    bytes: int = Field(ge=1)
    crc32: int | None = Field(default=None, ge=0, lt=2**32)


class Cursor(_Record):
    """Where an interrupted dump goes on. batch: its number. rows: those of it that are in the shards."""

    batch: int = Field(ge=0)
    rows: int = Field(ge=0)


class Manifest(_Record):
    """The folder as it stands.

    Attributes:
        d_model: width of the activations. columns: what the shards hold of each token.
        documents, empty_documents: texts in all, and those without a token.
        dropped, not_finite: up to the cursor's batch; of the latter the first 100 are named.
        tokens: rows of all shards. cursor: None once the dump is complete.
    """

    format: Literal[1] = 1
    identity: Identity
    d_model: int = Field(ge=1)
    columns: list[str]
    documents: int = Field(ge=0)
    empty_documents: int = Field(ge=0)
    dropped: Dropped
    not_finite: list[NotFinite]
    tokens: int = Field(ge=0)
    shards: list[ShardRecord]
    cursor: Cursor | None

    def column_types(self) -> dict[str, str]:
        """The dtype of each column, as safetensors names it."""
        known = {"acts": SAFETENSORS_DTYPES[self.identity.dtype], **TOKEN_COLUMNS, **MODEL_COLUMNS}
        return {name: known[name] for name in self.columns}

    def write(self, folder: Path) -> None:
        write_whole((self.model_dump_json(indent=1) + "\n").encode(), folder / MANIFEST_FILE)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder.

    Raises:
        ValueError: another form, or numbers that contradict each other. OSError: no regular file.
    """
    path = folder / MANIFEST_FILE
    try:
        manifest = Manifest.model_validate_json(read_regular(path, MAX_MANIFEST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "content"
        raise ValueError(f"{path}: {place} ({first['input']!r:.60}) is wrong: {first['msg']}") from error
    unknown = sorted(set(manifest.columns) - {"acts", *TOKEN_COLUMNS, *MODEL_COLUMNS})
    needed = ["acts", *TOKEN_COLUMNS]
    if unknown or manifest.columns[: len(needed)] != needed:
        raise ValueError(f"{path}: columns ({', '.join(manifest.columns)}) must be {', '.join(needed)}, tile, score")
    total = sum(shard.tokens for shard in manifest.shards)
    if total != manifest.tokens:
        raise ValueError(f"{path}: tokens ({manifest.tokens}) must be those of the shards ({total})")
    if manifest.cursor is None and total == 0:
        raise ValueError(f"{path}: shards of a complete dump ({len(manifest.shards)}) must be >= 1")
    full, limit = manifest.identity.settings.shard_tokens, len(manifest.shards) - (manifest.cursor is None)
    for index, shard in enumerate(manifest.shards):
        if shard.tokens > full or (index < limit and shard.tokens != full):
            raise ValueError(f"{path}: tokens of shard {index} ({shard.tokens}) must be shard_tokens ({full})")
    return manifest


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard_{index:05d}.safetensors"


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Compare the shards of a folder with its manifest; their values are not read.

    Raises:
        ValueError: a shard of another size, or with other columns, dtypes or shapes. OSError: one is missing.
    """
    types = manifest.column_types()
    for index, shard in enumerate(manifest.shards):
        path = shard_path(folder, index)
        size = path.stat().st_size
        if size != shard.bytes:
            why = "cut short" if size < shard.bytes else "changed"
            raise ValueError(f"{path} ({size} bytes) must have the {shard.bytes} bytes that it was written with: it was {why}")
        expected = {
            name: (dtype, (shard.tokens, manifest.d_model) if name == "acts" else (shard.tokens,))
            for name, dtype in types.items()
        }
        found = {name: tuple(column) for name, column in shard_columns(path).items()}
        if found != expected:
            raise ValueError(f"{path}: columns ({_text(found)}) must be those of the manifest ({_text(expected)})")


def check_identity(folder: Path, found: Identity, wanted: Identity) -> None:
    """Raise ValueError, with both values, unless the dump in the folder is of the same model, texts, site and settings."""
    ours = dict(_flat(wanted.model_dump()))
    for name, value in _flat(found.model_dump()):
        if value != ours[name]:
            raise ValueError(
                f"{folder}: {name} of the dump that is there ({value}) must be that of this one ({ours[name]}): "
                "choose another folder, or delete this one"
            )


def trix_version() -> str:
    try:
        return metadata.version("trix")
    except metadata.PackageNotFoundError:
        return "unknown"


def _flat(record: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield name, value


def _text(columns: Mapping[str, Any]) -> str:
    return json.dumps(columns)
