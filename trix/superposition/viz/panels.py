"""The documents that activate a latent most, as a page.

Legend: N rows (tokens, in the order of the shards), D width, K latents, R runs of rows of one document, B rows of a batch.
"""

import html
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from trix.introspection.page import definitions, page
from trix.superposition.analysis.encoding import SparseCoder, encoded_rows
from trix.superposition.viz.passages import LEFT_OUT, PASSAGE_STYLE, passage
from trix.superposition.viz.token_texts import Tokenizer, token_texts, whole_characters

BATCH_TOKENS = 4096  # encoded at once
EXPLANATION = (
    "The documents in which the latent is most active, each with the tokens around its strongest one. The stronger the colour, "
    "the larger the activation; a pointer held over a token shows the number. " + LEFT_OUT + " stands for tokens left out."
)

ROW = np.dtype([("token", np.int64), ("document", np.int64), ("value", np.float32)])
Rows = npt.NDArray[np.void]


def top_activations_panel(
    latent_j: int,
    act_files: Sequence[Path | str],
    tok_files: Sequence[Path | str],
    sae: SparseCoder,
    tokenizer: Tokenizer,
    device: torch.device | str,
    top_titles: int = 12,
    max_tokens_per_title: int = 64,
    min_alpha: float = 0.0,
) -> str:
    """A standalone HTML page: the documents in which latent j reaches its largest activations, the largest first.

    A document is what shares a number in the column titleidx. Of equal documents the one with the lower number comes first. The
    background of a token with activation z > 0 has the opacity

        min_alpha + (1 - min_alpha) z / largest activation of all,

    and tokens with z = 0 have none. The page has no script and loads nothing. The shards are read once, batch by batch; no more
    is kept than a batch and the passages that may be shown.

    Args:
        latent_j: the latent, in [0, K).
        act_files: shards of activations, in order. tok_files: for each of them the shard with tokids and titleidx of the same
            tokens; they may be the same files.
        sae: moves to the device, and encodes in evaluation mode.
        tokenizer: a text whose character i is token i; a tokenizer of Hugging Face; or a function from ids to as many texts.
        top_titles: documents shown at most. max_tokens_per_title: tokens shown of each, around its strongest one.
        min_alpha: opacity of the weakest activations, in [0, 1].

    Raises:
        ValueError: an argument out of range, no tokens, files that do not fit each other or the autoencoder, or a token id that
            the tokenizer does not know.
    """
    if not 0 <= latent_j < sae.k:
        raise ValueError(f"latent_j ({latent_j}) must be >= 0 and < k ({sae.k})")
    if top_titles < 1 or max_tokens_per_title < 1:
        raise ValueError(f"top_titles ({top_titles}) and max_tokens_per_title ({max_tokens_per_title}) must be >= 1")
    if not 0 <= min_alpha <= 1:
        raise ValueError(f"min_alpha ({min_alpha}) must be >= 0 and <= 1")
    found = _find(_rows(latent_j, act_files, tok_files, sae, device), top_titles, max_tokens_per_title)
    if found.num_tokens == 0:
        raise ValueError(f"act_files ({len(act_files)} files with {found.num_tokens} tokens) must hold at least 1 token")
    return _panel(latent_j, found, tokenizer, min_alpha)


class _Passage(NamedTuple):
    """Rows around the strongest one of a document, whose activation is the peak. goes_on: whether it has rows before, after."""

    document: int
    peak: float
    row_N: Rows
    goes_on: tuple[bool, bool]


class _Found(NamedTuple):
    """passages: sorted, the strongest first."""

    num_tokens: int
    num_active: int
    passages: list[_Passage]


def _rows(
    latent_j: int,
    act_files: Sequence[Path | str],
    tok_files: Sequence[Path | str],
    sae: SparseCoder,
    device: torch.device | str,
) -> Iterator[Rows]:
    """Token, document and activation of the latent, batch by batch."""
    for rows in encoded_rows(sae, act_files, tok_files, ("tokids", "titleidx"), device, BATCH_TOKENS):
        row_B = np.empty(len(rows.z_BK), dtype=ROW)
        row_B["token"], row_B["document"] = rows.columns["tokids"].numpy(), rows.columns["titleidx"].numpy()
        row_B["value"] = rows.z_BK[:, latent_j].cpu().numpy()
        yield row_B


def _find(batches: Iterable[Rows], num_documents: int, width: int) -> _Found:
    """A row is looked at when `width` rows after it are known; as many before it are kept. That is what a passage can need."""
    best = _TopDocuments(num_documents, width)
    buffer, done = np.empty(0, dtype=ROW), 0  # rows of the buffer before `done` have been looked at
    num_tokens = num_active = 0
    for row_B in batches:
        num_tokens += len(row_B)
        num_active += int(np.count_nonzero(row_B["value"]))
        kept = min(done, width)
        buffer, done = np.concatenate([buffer[done - kept :], row_B]), kept
        stop = len(buffer) - width
        if stop > done:
            best.add(buffer, done, stop)
            done = stop
    best.add(buffer, done, len(buffer))
    return _Found(num_tokens, num_active, sorted(best.passages.values(), key=_rank))


class _TopDocuments:
    """The passages of the documents with the largest activations so far, by document."""

    def __init__(self, num_documents: int, width: int) -> None:
        self.num_documents, self.width = num_documents, width
        self.passages: dict[int, _Passage] = {}
        self.least = 0.0  # peak of the last document, once there are enough

    def add(self, row_N: Rows, start: int, stop: int) -> None:
        """Look at the rows from start to before stop; the others are there to be shown."""
        if stop == start:
            return
        value_N, document_N = row_N["value"], row_N["document"]
        border_R = np.concatenate([[0], np.flatnonzero(np.diff(document_N)) + 1, [len(row_N)]])
        first_R = np.unique(np.append(border_R[(border_R > start) & (border_R < stop)], start))
        peak_R = np.maximum.reduceat(value_N[:stop], first_R)
        for run in np.flatnonzero((peak_R > 0) & (peak_R >= self.least)).tolist():
            document, peak = int(document_N[first_R[run]]), float(peak_R[run])
            if document in self.passages and self.passages[document].peak >= peak:
                continue
            place = int(first_R[run]) + int(np.argmax(value_N[first_R[run] : stop] == peak_R[run]))
            self.passages[document] = self._passage(row_N, border_R, place)
            if len(self.passages) > self.num_documents:
                del self.passages[max(self.passages.values(), key=_rank).document]
                self.least = min(passage.peak for passage in self.passages.values())

    def _passage(self, row_N: Rows, border_R: npt.NDArray[np.intp], place: int) -> _Passage:
        run = int(np.searchsorted(border_R, place, side="right"))
        low, high = int(border_R[run - 1]), int(border_R[run])
        first = max(low, min(place - self.width // 2, high - self.width))
        stop = min(first + self.width, high)
        row = row_N[place]
        return _Passage(int(row["document"]), float(row["value"]), row_N[first:stop].copy(), (first > low, stop < high))


def _rank(passage: _Passage) -> tuple[float, int]:
    return -passage.peak, passage.document


def _panel(latent_j: int, found: _Found, tokenizer: Tokenizer, min_alpha: float) -> str:
    title = f"Latent {latent_j}"
    measured = ("measured on", f"{found.num_tokens:,} tokens")
    if not found.passages:
        return page(title, f"{definitions([measured])}<p>The latent is active at none of these tokens: it never fires.</p>")
    largest = found.passages[0].peak
    facts = (
        measured,
        ("active at", f"{found.num_active:,} tokens ({found.num_active / found.num_tokens:.2%})"),
        ("largest activation", f"{largest:.4g}"),
    )
    cards = "".join(_card(passage, tokenizer, largest, min_alpha) for passage in found.passages)
    body = f'{definitions(facts)}<p class="muted">{html.escape(EXPLANATION)}</p><div class="tiles">{cards}</div>'
    return page(title, body, f"<style>{PASSAGE_STYLE}</style>")


def _card(found: _Passage, tokenizer: Tokenizer, largest: float, min_alpha: float) -> str:
    ids = found.row_N["token"].tolist()
    texts = whole_characters(tokenizer, ids, token_texts(tokenizer, ids))
    text = passage(texts, found.row_N["value"].tolist(), largest, goes_on=found.goes_on, min_alpha=min_alpha)
    head = f'<p class="muted">document {found.document}, largest activation {found.peak:.4g}</p>'
    return f'<div class="tile">{head}{text}</div>'
