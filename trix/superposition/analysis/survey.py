"""What latents do over a dump: how often and how strongly they fire, examples by the strength of the activation, and tiles.

Legend: N tokens, B tokens of a batch, K latents, M of them that are looked at closely, A candidates, E tiles, S activations,
X examples, W tokens of a passage and one more on either side, H bins of a histogram.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trix.superposition.analysis.encoding import EncodedRows, SparseCoder, encoded_rows
from trix.superposition.analysis.top_tokens import Candidates

GROUPS = ("top", "75-100 %", "50-75 %", "25-50 %", "0-25 %")
BATCH_TOKENS = 4096
HISTOGRAM_BINS = 30
SAMPLE_SIZE = 1024
BEFORE, AFTER = 26, 13  # tokens of a passage around its own
POOL = 32  # strongest tokens that are kept for each one that is shown, as many of them are neighbours
MAX_TILES = 2**16
MAX_EXAMPLES = 100  # of a group
SHOWN_TILES = 5

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class SurveyedSAE(SparseCoder, Protocol):
    """An autoencoder with a decoder, W_dec [K, O]."""

    W_dec: Any


class Example(NamedTuple):
    """A token at which a latent is active, with its neighbours in the same document.

    row: number of the token among those of the dump. place: where it stands in the passage. token_N, value_N: the tokens of
    the passage, and the activation at each. goes_on: whether the document has tokens before the passage, and after it.
    """

    row: int
    document: int
    place: int
    token_N: list[int]
    value_N: list[float]
    goes_on: tuple[bool, bool]


class Group(NamedTuple):
    """Examples whose activations are of like rank. low, high: the smallest and the largest activation of the group."""

    name: str
    low: float
    high: float
    examples: list[Example]


class TileShare(NamedTuple):
    """share: part of the tokens at which the latent fires that go to the tile. lift: this share over that of all tokens."""

    tile: int
    share: float
    lift: float


@dataclass(frozen=True)
class LatentRecord:
    """One latent.

    num_active: tokens at which it fires. mass_share: its part of the summed activation times norm of the decoder row.
    largest: its largest activation. count_H: the activations > 0 in HISTOGRAM_BINS equal bins from 0 to the largest.
    groups: those of GROUPS that have examples. tiles: where the most of its tokens go, for a dump with tiles.
    """

    latent: int
    num_active: int
    mass_share: float
    largest: float
    count_H: list[int]
    groups: list[Group]
    tiles: list[TileShare]


@dataclass(frozen=True)
class Survey:
    """num_active_K: int64, tokens at which each latent fires. latents: the records of those that were asked for."""

    num_tokens: int
    num_active_K: Ints
    latents: list[LatentRecord]

    @property
    def density_K(self) -> Floats:  # noqa: N802 (shape suffix)
        """Share of the tokens at which each latent fires."""
        return self.num_active_K / self.num_tokens


def survey_latents(
    sae: SurveyedSAE,
    paths: Sequence[Path | str],
    latents: Sequence[int],
    device: torch.device | str,
    *,
    has_tiles: bool = False,
    num_examples: int = 4,
    seed: int = 0,
    advance: Callable[[int], None] = lambda _: None,
) -> Survey:
    """Read a dump twice, batch by batch: first which tokens to show, then the tokens around them.

    The group "top" holds the largest activations. For the other four, the activations of a latent that are > 0 are ordered by
    size and divided into four parts of equal number (equal activations: the earlier token first), and examples are drawn from
    each part at random. Of a latent with more than SAMPLE_SIZE activations, a random sample of that many is divided; all other
    figures are exact. The passages of a latent do not overlap: a token too close to one that is shown is passed over.

    Equal arguments give equal results, whatever the sizes of the shards. In memory are a batch, the candidates of the latents
    asked for, and the passages.

    Args:
        paths: the shards of the dump, with the columns tokids and titleidx, in order. latents: those to look at, M different
            numbers. has_tiles: whether there is a column tile. num_examples: of each group, at most. seed: of the samples.
        advance: called with the number of tokens that were read, 2 N in all.

    Raises:
        ValueError: no latents, one that is not in [0, k) or is there twice, num_examples out of range, no tokens, latents that
            are not finite, a tile < 0 or >= MAX_TILES, or files that do not fit.
    """
    wrong = [latent for latent in latents if not 0 <= latent < sae.k]
    if wrong:
        raise ValueError(f"latent ({wrong[0]}) must be >= 0 and < k ({sae.k})")
    if not latents or len(set(latents)) < len(latents):
        raise ValueError(f"latents ({len(latents)}, {len(set(latents))} of them different) must be >= 1, each given once")
    if not 1 <= num_examples <= MAX_EXAMPLES:
        raise ValueError(f"num_examples ({num_examples}) must be >= 1 and <= {MAX_EXAMPLES}")
    columns = ("tokids", "titleidx", *(("tile",) if has_tiles else ()))

    counts = _Counts(sae, latents, device, POOL * num_examples, seed)
    for rows in encoded_rows(sae, paths, paths, columns, device, BATCH_TOKENS):
        counts.add(rows)
        advance(len(rows.z_BK))
    if counts.num_tokens == 0:
        raise ValueError(f"number of tokens in the dump ({counts.num_tokens}) must be >= 1")
    largest_M = counts.largest_K[counts.latent_M].cpu()
    chosen = _chosen(counts.top.kept(), counts.sample.kept(), num_examples)

    passages = _Passages(chosen, largest_M, counts.num_tokens)
    for rows in encoded_rows(sae, paths, paths, columns, device, BATCH_TOKENS):
        passages.add(rows, rows.z_BK[:, counts.latent_M])
        advance(len(rows.z_BK))
    num_active_K = counts.num_active_K.cpu().numpy()
    norm_K = sae.W_dec.detach().double().norm(dim=-1)
    mass_K = counts.sum_K * norm_K.to(counts.sum_K.device)
    share_K = (mass_K / mass_K.sum().clamp_min(torch.finfo(torch.float64).tiny)).cpu().tolist()
    groups = passages.groups()
    records = [
        LatentRecord(
            latent,
            int(num_active_K[latent]),
            share_K[latent],
            float(largest_M[index]),
            passages.count_MH[index].tolist(),
            groups[index],
            _tiles(counts.tile_ME[index], counts.tile_E) if has_tiles else [],
        )
        for index, latent in enumerate(latents)
    ]
    return Survey(counts.num_tokens, num_active_K, records)


class _Counts:
    """What the first reading finds out."""

    def __init__(self, sae: SparseCoder, latents: Sequence[int], device: torch.device | str, num_top: int, seed: int) -> None:
        self.latent_M = torch.tensor(latents, dtype=torch.int64, device=device)
        self.num_tokens = 0
        self.num_active_K = torch.zeros(sae.k, dtype=torch.int64, device=device)
        self.sum_K = torch.zeros(sae.k, dtype=torch.float64, device=device)
        self.largest_K = torch.zeros(sae.k, device=device)
        self.top = Candidates(len(latents), num_top, device)
        self.sample = Candidates(len(latents), SAMPLE_SIZE, device)
        self.draw = np.random.default_rng(seed)
        self.tile_E = np.zeros(0, dtype=np.int64)
        self.tile_ME = np.zeros((len(latents), 0), dtype=np.int64)

    def add(self, rows: EncodedRows) -> None:
        z_BK = rows.z_BK
        self.num_tokens += len(z_BK)
        self.num_active_K += (z_BK > 0).sum(dim=0)
        self.sum_K += z_BK.sum(dim=0, dtype=torch.float64)
        self.largest_K = torch.maximum(self.largest_K, z_BK.amax(dim=0))
        z_BM = z_BK[:, self.latent_M]
        token_S, latent_S = torch.nonzero(z_BM > 0, as_tuple=True)
        value_S = z_BM[token_S, latent_S]
        # The largest of random keys are a random sample. They are drawn token by token, so shards and batches do not matter.
        key_S = torch.from_numpy(1 - self.draw.random(len(token_S), dtype=np.float32)).to(z_BK.device)
        for kept, order_S in ((self.top, value_S), (self.sample, key_S)):
            is_better_S = order_S > kept.least_K[latent_S]
            kept.add(*(part_S[is_better_S] for part_S in (latent_S, token_S + rows.start, order_S, value_S)))
        if "tile" in rows.columns:
            self._add_tiles(rows.columns["tile"].numpy(), token_S.cpu().numpy(), latent_S.cpu().numpy())

    def _add_tiles(self, tile_B: Ints, token_S: Ints, latent_S: Ints) -> None:
        low, high = int(tile_B.min()), int(tile_B.max())
        if low < 0 or high >= MAX_TILES:
            raise ValueError(f"tiles of the dump ({low} to {high}) must be >= 0 and < {MAX_TILES}")
        missing = max(high + 1 - len(self.tile_E), 0)
        self.tile_E = np.pad(self.tile_E, (0, missing))
        self.tile_ME = np.pad(self.tile_ME, ((0, 0), (0, missing)))
        num_tiles = len(self.tile_E)
        self.tile_E += np.bincount(tile_B, minlength=num_tiles)
        pair_S = latent_S * num_tiles + tile_B[token_S]
        self.tile_ME += np.bincount(pair_S, minlength=self.tile_ME.size).reshape(self.tile_ME.shape)


class _Choice(NamedTuple):
    """Tokens to show of one group of a latent."""

    column: int  # of the latent among the M
    name: str
    low: float
    high: float
    rows: list[int]


def _chosen(top: tuple[Tensor, Tensor], sample: tuple[Tensor, Tensor], num_examples: int) -> list[_Choice]:
    found = []
    for index, (top_A, value_A, row_A, drawn_A) in enumerate(zip(*top, *sample, strict=True)):
        num_active = int((row_A >= 0).sum())
        if num_active == 0:
            continue
        shown: list[int] = []
        strongest = [row for row in top_A.tolist() if row >= 0]
        rows = _apart(strongest, shown, num_examples)
        values = dict(zip(strongest, value_A.tolist(), strict=False))
        found.append(_Choice(index, GROUPS[0], min(values[row] for row in rows), max(values[row] for row in rows), rows))
        row_S, value_S = row_A[:num_active].numpy(), drawn_A[:num_active].numpy()
        order_S = np.lexsort((row_S, -value_S))  # the largest activation first
        for name, part in zip(GROUPS[1:], np.array_split(order_S, len(GROUPS) - 1), strict=True):
            if len(part) > 0:
                drawn = _apart(row_S[np.sort(part)].tolist(), shown, num_examples)  # in the order of the random keys
                found.append(_Choice(index, name, float(value_S[part].min()), float(value_S[part].max()), drawn))
    return found


def _apart(rows: Sequence[int], shown: list[int], limit: int) -> list[int]:
    """The first rows whose passages overlap none that is shown; they are added to those."""
    taken: list[int] = []
    for row in rows:
        if len(taken) == limit:
            break
        if all(abs(row - other) > BEFORE + AFTER for other in shown):
            taken.append(row)
            shown.append(row)
    return taken


class _Passages:
    """What the second reading finds: the tokens around the chosen ones, and how the activations are spread."""

    def __init__(self, choices: Sequence[_Choice], largest_M: Tensor, num_tokens: int) -> None:
        self.choices, self.largest_M = choices, largest_M
        self.count_MH = np.zeros((len(largest_M), HISTOGRAM_BINS), dtype=np.int64)
        centre_X = np.array([row for choice in choices for row in choice.rows], dtype=np.int64)
        row_XW = centre_X[:, None] + np.arange(-BEFORE - 1, AFTER + 2)
        self.row_XW = np.where((row_XW >= 0) & (row_XW < num_tokens), row_XW, centre_X[:, None])
        self.is_there_XW = self.row_XW == row_XW
        self.latent_X = np.array([choice.column for choice in choices for _ in choice.rows], dtype=np.int64)
        self.order_S = np.argsort(self.row_XW, axis=None, kind="stable")
        self.sorted_S = self.row_XW.ravel()[self.order_S]
        self.token_XW, self.document_XW = np.zeros_like(row_XW), np.zeros_like(row_XW)
        self.value_XW = np.zeros(row_XW.shape, dtype=np.float32)

    def add(self, rows: EncodedRows, z_BM: Tensor) -> None:
        first, last = np.searchsorted(self.sorted_S, (rows.start, rows.start + len(z_BM)))
        place_S, row_S = self.order_S[first:last], self.sorted_S[first:last] - rows.start
        self.token_XW.ravel()[place_S] = rows.columns["tokids"].numpy()[row_S]
        self.document_XW.ravel()[place_S] = rows.columns["titleidx"].numpy()[row_S]
        latent_S = self.latent_X[place_S // self.row_XW.shape[1]]
        z_BM, largest_M = z_BM.cpu(), self.largest_M
        self.value_XW.ravel()[place_S] = z_BM.numpy()[row_S, latent_S]
        token_S, active_S = torch.nonzero(z_BM > 0, as_tuple=True)
        bin_S = (z_BM[token_S, active_S] / largest_M[active_S] * HISTOGRAM_BINS).long().clamp_(max=HISTOGRAM_BINS - 1)
        cell_S = active_S * HISTOGRAM_BINS + bin_S
        self.count_MH += torch.bincount(cell_S, minlength=self.count_MH.size).reshape(self.count_MH.shape).numpy()

    def groups(self) -> list[list[Group]]:
        """Of each of the M latents."""
        found: list[list[Group]] = [[] for _ in self.largest_M]
        number = 0
        for choice in self.choices:
            examples = [self._example(number + place) for place in range(len(choice.rows))]
            number += len(examples)
            if examples:
                found[choice.column].append(Group(choice.name, choice.low, choice.high, examples))
        return found

    def _example(self, number: int) -> Example:
        centre = BEFORE + 1
        document = int(self.document_XW[number, centre])
        is_shown_W = self.is_there_XW[number] & (self.document_XW[number] == document)
        before, after = bool(is_shown_W[0]), bool(is_shown_W[-1])
        is_shown_W[[0, -1]] = False
        return Example(
            int(self.row_XW[number, centre]),
            document,
            int(is_shown_W[:centre].sum()),
            self.token_XW[number, is_shown_W].tolist(),
            self.value_XW[number, is_shown_W].tolist(),
            (before, after),
        )


def _tiles(count_E: Ints, all_E: Ints) -> list[TileShare]:
    total = int(count_E.sum())
    order_E = np.argsort(-count_E, kind="stable")[:SHOWN_TILES]
    return [
        TileShare(tile, count_E[tile] / total, count_E[tile] / total / (all_E[tile] / all_E.sum()))
        for tile in order_E.tolist()
        if count_E[tile] > 0
    ]
