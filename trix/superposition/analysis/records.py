"""What each latent does, in files of the kind that EleutherAI's delphi keeps: a cache of all activations, and examples.

A window holds neighbouring tokens of one document: those whose positions have the same quotient by ``context``. A token stands
in it at the remainder, so that tokens which the dump left out leave their places empty.

Shapes: N tokens, K latents, W windows, C places of a window, L latents that are recorded, E examples, M entries of the cache.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from trix.regular_files import read_regular
from trix.superposition.analysis.encoding import SparseCoder, encoded_batches
from trix.superposition.backends.io_store import column_rows, num_rows, read_column, shard_columns, write_shard
from trix.superposition.dump import ActivationDump
from trix.whole_file import write_whole

RECORDS_FILE, EXAMPLES_FILE, CACHE_FOLDER = "records.json", "examples.safetensors", "cache"
MAX_JSON_BYTES = 2**28
MAX_PLACES = 2**27  # of all examples together: 1.5 GB
NORMALISED_MAX = 10
_COLUMNS = {"latent": "I64", "window": "I64", "quantile": "I64", "tokens": "I64", "activations": "F32"}
_CACHE_COLUMNS = {"tokens": "I64", "locations": "I32", "activations": "F32"}


class LatentExample(NamedTuple):
    """One window. window: its number in the dump. quantile: 1 to the number of quantiles, 0 where the latent is silent.

    tokens, activations: of each place; an empty place holds the padding token and 0. normalised: activations in tenths of the
    latent's largest one, rounded down.
    """

    window: int
    quantile: int
    tokens: list[int]
    activations: list[float]
    normalised: list[int]


@dataclass(frozen=True)
class LatentRecord:
    """A latent: the tokens on which it is active, its largest activation, examples with it (strongest first) and without."""

    latent: int
    num_active: int
    max_activation: float
    examples: list[LatentExample]
    not_active: list[LatentExample]


@dataclass(frozen=True)
class LatentRecords:
    """What :func:`write_latent_records` wrote: records by latent, and how they came about."""

    folder: Path
    records: dict[int, LatentRecord]
    source: dict[str, str | int]
    num_tokens: int
    num_windows: int
    num_parts: int

    def cache(self) -> Iterator[dict[str, Tensor]]:
        """The parts of the cache in order.

        tokens: int64 [w, C], the windows of the part. locations: int32 [M, 3], the window in the part, place and latent of each
        activation above 0. activations: float32 [M].

        Raises:
            ValueError: a part that is damaged or of another form. OSError: one is missing.
        """
        for number in range(self.num_parts):
            path = _part_path(self.folder, number)
            _check_columns(path, _CACHE_COLUMNS)
            part = {name: read_column(path, name) for name in _CACHE_COLUMNS}
            tokens_WC, locations_M3, activation_M = part.values()
            if tokens_WC.ndim != 2 or locations_M3.shape != (*activation_M.shape[:1], 3) or activation_M.ndim != 1:
                shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in part.items())
                raise ValueError(f"{path}: shapes ({shapes}) must be [w, C], [M, 3] and [M]")
            if bool((locations_M3 < 0).any()) or bool((locations_M3[:, :2] >= torch.tensor(tokens_WC.shape)).any()):
                raise ValueError(f"{path}: locations must be >= 0 and within the windows {list(tokens_WC.shape)}")
            yield part


class _Content(BaseModel):
    """What records.json holds; the lists are by recorded latent."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    format: Literal[1] = 1
    source: dict[str, str | int]
    latents: list[int]
    num_active: list[int]
    max_activations: list[float]
    context: int = Field(ge=1)
    quantiles: int = Field(ge=1)
    num_tokens: int = Field(ge=0)
    num_windows: int = Field(ge=0)
    num_parts: int = Field(ge=0)


class _Batch(NamedTuple):
    """Whole windows. z_NL: latents that are recorded. row_WC: the row of each place, -1 where it is empty."""

    first_window: int
    token_N: Tensor
    z_NL: Tensor
    row_WC: Tensor

    def tokens_WC(self, pad_token: int) -> Tensor:  # noqa: N802 (shape suffix)
        return torch.where(self.row_WC >= 0, self.token_N[self.row_WC.clamp_min(0)], pad_token)


def write_latent_records(
    sae: SparseCoder,
    dump: ActivationDump,
    folder: Path | str,
    *,
    latents: Sequence[int] | None = None,
    context: int = 32,
    quantiles: int = 10,
    per_quantile: int = 4,
    not_active: int = 20,
    pad_token: int = 0,
    seed: int = 0,
    batch: int = 8192,
    device: torch.device | str = "cpu",
) -> LatentRecords:
    """Write the cache of a dump's activations, and for each latent examples at random from each quantile.

    Quantile q of Q holds the windows whose largest activation is in ((q - 1) / Q, q / Q] of the latent's largest one. The dump
    is encoded three times, ``batch`` tokens at a time: memory holds one batch and the examples, whatever the dump's size.

    Files: ``cache/part_*.safetensors`` with delphi's ``tokens``, ``locations`` and ``activations``, split by tokens, where
    delphi splits by latents; ``examples.safetensors``; and ``records.json``, which is written last.

    Args:
        latents: those that are recorded, by default all. context: places of a window. per_quantile: examples of a latent from
            each quantile, at most. not_active: windows on which it is silent, at most. pad_token: the token of empty places.

    Returns:
        What :func:`read_records` reads from the folder.

    Raises:
        ValueError: a folder with records in it, a latent that the autoencoder lacks or that is named twice, a size out of
            range, or a dump of another width. OSError: a file cannot be written.
    """
    folder = Path(folder)
    latent_L = torch.arange(sae.k) if latents is None else torch.tensor(list(latents), dtype=torch.int64)
    sizes = {"context": context, "quantiles": quantiles, "per_quantile": per_quantile, "batch": batch}
    for name, value in {**sizes, "not_active + 1": not_active + 1, "number of latents": len(latent_L)}.items():
        if value < 1:
            raise ValueError(f"{name} ({value}) must be >= 1")
    if latent_L.min() < 0 or latent_L.max() >= sae.k or len(set(latent_L.tolist())) < len(latent_L):
        raise ValueError(f"latents ({latent_L.min()} to {latent_L.max()}) must be >= 0 and < {sae.k}, each named once")
    num_places = len(latent_L) * (quantiles * per_quantile + not_active) * context
    if num_places > MAX_PLACES:
        raise ValueError(f"places of all examples ({num_places}) must be <= {MAX_PLACES}: record fewer latents or examples")
    if (folder / RECORDS_FILE).exists():
        raise ValueError(f"{folder} must not hold records yet")

    def windows() -> Iterator[_Batch]:
        return _windows(sae, dump, latent_L, context, batch, device)

    max_L, count_L = torch.zeros(len(latent_L)), torch.zeros(len(latent_L), dtype=torch.int64)
    num_parts = num_windows = 0
    for found in windows():
        write_shard(_part_path(folder, num_parts), _cache_part(found, latent_L, pad_token))
        max_L = torch.maximum(max_L, found.z_NL.amax(dim=0))
        count_L += (found.z_NL > 0).sum(dim=0)
        num_parts, num_windows = num_parts + 1, num_windows + len(found.row_WC)
    chosen = _Draw(quantiles, per_quantile, not_active, seed)
    for found in windows():
        chosen.add(found, max_L)
    write_shard(folder / EXAMPLES_FILE, _examples(windows(), chosen, latent_L, pad_token))
    identity = dump.manifest.identity
    content = _Content(
        source={"model": identity.model, "data": identity.data, "site": identity.site, "layer": identity.layer},
        latents=latent_L.tolist(),
        num_active=count_L.tolist(),
        max_activations=max_L.tolist(),
        context=context,
        quantiles=quantiles,
        num_tokens=len(dump),
        num_windows=num_windows,
        num_parts=num_parts,
    )
    write_whole((content.model_dump_json(indent=1) + "\n").encode(), folder / RECORDS_FILE)
    return read_records(folder)


def read_records(folder: Path | str) -> LatentRecords:
    """Read what :func:`write_latent_records` wrote; the cache is left on the disk.

    Raises:
        ValueError: a file of another form, or files that do not belong together. OSError: a file is missing.
    """
    folder = Path(folder)
    path = folder / RECORDS_FILE
    try:
        content = _Content.model_validate_json(read_regular(path, MAX_JSON_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{path}: {'.'.join(map(str, first['loc'])) or 'content'} is wrong: {first['msg']}") from error
    lengths = [len(values) for values in (content.latents, content.num_active, content.max_activations)]
    if len(set(lengths)) > 1 or len(set(content.latents)) < lengths[0]:
        raise ValueError(f"{path}: lists by latent ({lengths} entries) must be equally long, and name each latent once")
    path = folder / EXAMPLES_FILE
    num_examples = _check_columns(path, _COLUMNS, content.context)
    columns = {name: read_column(path, name) for name in _COLUMNS}
    if not bool(columns["activations"].isfinite().all()):
        raise ValueError(f"{path}: activations must be finite")
    about = dict(zip(content.latents, zip(content.num_active, content.max_activations, strict=True), strict=True))
    unknown = sorted(set(columns["latent"].tolist()) - about.keys())
    if unknown:
        raise ValueError(f"{path}: latent ({unknown[0]}) of an example must be one of {RECORDS_FILE}")
    examples: dict[int, list[LatentExample]] = {latent: [] for latent in content.latents}
    for row in range(num_examples):
        latent = int(columns["latent"][row])
        activation_C = columns["activations"][row]
        examples[latent].append(
            LatentExample(
                int(columns["window"][row]),
                int(columns["quantile"][row]),
                columns["tokens"][row].tolist(),
                activation_C.tolist(),
                normalised(activation_C, about[latent][1]),
            )
        )
    records = {
        latent: LatentRecord(
            latent,
            *about[latent],
            sorted((example for example in found if example.quantile), key=lambda example: -max(example.activations)),
            [example for example in found if not example.quantile],
        )
        for latent, found in examples.items()
    }
    return LatentRecords(folder, records, content.source, content.num_tokens, content.num_windows, content.num_parts)


def normalised(activation_C: Tensor, largest: float) -> list[int]:
    """Activations >= 0 in tenths of the latent's largest one, rounded down; the largest itself is 10, and 0 of 0 is 0."""
    # Ten times a float32 is exact in float64, so that the largest divided by itself is no 9.999.
    return (activation_C.double() * NORMALISED_MAX / (largest or 1.0)).floor().long().tolist()


def _part_path(folder: Path, number: int) -> Path:
    return folder / CACHE_FOLDER / f"part_{number:05d}.safetensors"


def _check_columns(path: Path, types: dict[str, str], context: int | None = None) -> int:
    """Compare the columns of a file with what it must hold; returns the rows of its first column."""
    found = shard_columns(path)
    if {name: column.dtype for name, column in found.items()} != types:
        held = ", ".join(f"{name} {column.dtype}" for name, column in found.items())
        raise ValueError(f"{path}: columns ({held}) must be {', '.join(f'{name} {dtype}' for name, dtype in types.items())}")
    shapes = {name: found[name].shape for name in types}
    if not all(shapes.values()):
        raise ValueError(f"{path}: columns must have a dimension each, shapes ({shapes})")
    if context is not None:
        rows = shapes["latent"][:1]
        wanted = {name: (*rows, context) if name in ("tokens", "activations") else rows for name in types}
        if shapes != wanted:
            raise ValueError(f"{path}: shapes ({shapes}) must be {wanted}")
    return next(iter(shapes.values()))[0]


def _windows(
    sae: SparseCoder, dump: ActivationDump, latent_L: Tensor, context: int, batch: int, device: torch.device | str
) -> Iterator[_Batch]:
    """The dump in batches that end where a window ends."""
    rows = _whole_windows(dump, context, batch)
    first_window = 0
    kept: list[tuple[Tensor, NDArray[np.int64], NDArray[np.int64]]] = []

    def activations() -> Iterator[Tensor]:
        for x_ND, token_N, window_N, place_N in rows:
            kept.append((token_N, window_N, place_N))
            yield x_ND

    for _, z_NK in encoded_batches(sae, activations(), device):
        token_N, window_N, place_N = kept.pop()
        row_WC = np.full((int(window_N[-1]) + 1, context), -1)
        row_WC[window_N, place_N] = np.arange(len(window_N))
        yield _Batch(first_window, token_N, z_NK.cpu()[:, latent_L], torch.from_numpy(row_WC))
        first_window += len(row_WC)


def _whole_windows(
    dump: ActivationDump, context: int, batch: int
) -> Iterator[tuple[Tensor, Tensor, NDArray[np.int64], NDArray[np.int64]]]:
    """Activations, token ids, number of the window in the batch, and place in it, of about ``batch`` rows at a time."""
    names = ("acts", "tokids", "titleidx", "position")
    held = {name: torch.zeros(0) for name in names}
    for index, path in enumerate(dump.paths):
        size = num_rows(path)
        for start in range(0, size, batch):
            part = {name: column_rows(path, name, start, min(start + batch, size)) for name in names}
            if len(held["acts"]):
                part = {name: torch.cat([held[name], part[name]]) for name in names}
            document_N, position_N = part["titleidx"].numpy(), part["position"].numpy()
            is_new_N = (np.diff(document_N) != 0) | (np.diff(position_N // context) != 0)
            window_N = np.concatenate([[0], is_new_N.cumsum()])
            is_last = index == len(dump.paths) - 1 and start + batch >= size
            end = len(window_N) if is_last else int(np.searchsorted(window_N, window_N[-1]))
            if end:
                yield part["acts"][:end].float(), part["tokids"][:end], window_N[:end], position_N[:end] % context
            held = {name: value[end:].clone() for name, value in part.items()}


def _cache_part(found: _Batch, latent_L: Tensor, pad_token: int) -> dict[str, Tensor]:
    window_N, place_N = torch.zeros_like(found.token_N), torch.zeros_like(found.token_N)
    window_R, place_R = (found.row_WC >= 0).nonzero(as_tuple=True)
    row_R = found.row_WC[window_R, place_R]
    window_N[row_R], place_N[row_R] = window_R, place_R
    row_M, column_M = (found.z_NL > 0).nonzero(as_tuple=True)
    locations_M3 = torch.stack([window_N[row_M], place_N[row_M], latent_L[column_M]], dim=1)
    return {"tokens": found.tokens_WC(pad_token), "locations": locations_M3.int(), "activations": found.z_NL[row_M, column_M]}


class _Draw:
    """Windows drawn at random for each latent and quantile: of every group those with the smallest random numbers.

    Group l * (quantiles + 1) + q holds the windows of latent l in quantile q, where 0 stands for silence.
    """

    def __init__(self, quantiles: int, per_quantile: int, not_active: int, seed: int) -> None:
        self._quantiles, self._limits = quantiles, np.array([not_active] + [per_quantile] * quantiles)
        self._draw = np.random.default_rng(seed)
        self._group_E, self._window_E = np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self._number_E = np.zeros(0)

    def add(self, found: _Batch, max_L: Tensor) -> None:
        strongest_WL = _strongest(found)
        share_WL = strongest_WL / np.maximum(max_L.numpy(), np.finfo(np.float32).tiny)
        quantile_WL = np.ceil(share_WL * self._quantiles).astype(np.int64).clip(0, self._quantiles)
        group_WL = np.arange(quantile_WL.shape[1]) * (self._quantiles + 1) + quantile_WL
        window_WL = np.broadcast_to(found.first_window + np.arange(len(group_WL))[:, None], group_WL.shape)
        group = np.concatenate([self._group_E, group_WL.ravel()])
        window = np.concatenate([self._window_E, window_WL.ravel()])
        number = np.concatenate([self._number_E, self._draw.random(group_WL.size)])
        order = np.lexsort((number, group))
        group = group[order]
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        is_kept = rank < self._limits[group % (self._quantiles + 1)]
        self._group_E, self._window_E, self._number_E = group[is_kept], window[order][is_kept], number[order][is_kept]

    def of_windows(self, first: int, end: int) -> tuple[Tensor, Tensor, Tensor]:
        """Index of the latent, window and quantile of the examples that are in these windows."""
        is_here_E = (self._window_E >= first) & (self._window_E < end)
        latent_e, quantile_e = np.divmod(self._group_E[is_here_E], self._quantiles + 1)
        return torch.from_numpy(latent_e), torch.from_numpy(self._window_E[is_here_E]), torch.from_numpy(quantile_e)


def _strongest(found: _Batch) -> NDArray[np.float32]:
    """The largest activation of each window and latent, float32 [W, L]; the rows of a window are neighbours."""
    start_W = np.concatenate([[0], (found.row_WC >= 0).sum(dim=1).cumsum(dim=0)[:-1].numpy()])
    strongest_WL: NDArray[np.float32] = np.maximum.reduceat(found.z_NL.numpy(), start_W, axis=0)
    return strongest_WL


def _examples(batches: Iterator[_Batch], chosen: _Draw, latent_L: Tensor, pad_token: int) -> dict[str, Tensor]:
    """The columns of the examples, with the tokens and activations of their windows."""
    parts: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}
    for found in batches:
        index_e, window_e, quantile_e = chosen.of_windows(found.first_window, found.first_window + len(found.row_WC))
        at_e = window_e - found.first_window
        row_eC = found.row_WC[at_e]
        z_eC = torch.where(row_eC >= 0, found.z_NL[row_eC.clamp_min(0), index_e.unsqueeze(1)], 0.0)
        columns = (latent_L[index_e], window_e, quantile_e, found.tokens_WC(pad_token)[at_e], z_eC)
        for name, column in zip(_COLUMNS, columns, strict=True):
            parts[name].append(column)
    return {name: torch.cat(columns) for name, columns in parts.items()}
