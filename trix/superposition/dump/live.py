"""Activations straight from a model, shuffled in bounded memory: nothing is written to disk.

N tokens, D width.
"""

from collections.abc import Iterator
from itertools import count
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trix.superposition.backends.base_model import DTYPES, CausalLMBackend, Site
from trix.superposition.config import DTypeName
from trix.superposition.dump.batch_rows import read_rows
from trix.superposition.dump.texts import TokenizedTexts

LivePart = Literal["training", "validation"]
CHUNK = 4096  # rows that leave the buffer at once


class LiveActivations:
    """The rows that a dump of these texts at this site would hold, computed as they are asked for.

    Texts are read in the batches of the dump, so the same tokens are left out, and values are rounded as in its files. At most
    ``buffer_tokens`` rows and those of one batch of texts are held at a time.

    Args:
        texts: of ``backend``. site: one that gives vectors. text_batch: texts of a batch. buffer_tokens: rows that are shuffled
            at once. dtype: to which values are rounded. drop_sinks: as in :class:`~trix.superposition.DumpConfig`.
        held_out: share of the batches of texts that are for validation, drawn with the seed.

    Attributes:
        d_model: D. num_tokens: of each part; sinks, except first positions, and broken values are among them, as only the model
            can tell.

    Raises:
        ValueError: text_batch or buffer_tokens < 1, held_out out of (0, 1), a part without texts, or a site that the
            model lacks.
    """

    def __init__(
        self,
        backend: CausalLMBackend,
        texts: TokenizedTexts,
        site: Site,
        text_batch: int = 64,
        buffer_tokens: int = 65536,
        dtype: DTypeName = "bf16",
        drop_sinks: bool = True,
        held_out: float = 0.1,
        seed: int = 0,
    ) -> None:
        if min(text_batch, buffer_tokens) < 1:
            raise ValueError(f"text_batch ({text_batch}) and buffer_tokens ({buffer_tokens}) must be >= 1")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out ({held_out}) must be > 0 and < 1")
        if site.name not in backend.sites:
            raise ValueError(f"site ({site}) must be one of {', '.join(backend.sites)}")
        self.backend, self.texts, self.site = backend, texts, site
        self.buffer_tokens, self._dtype, self._drop_sinks = buffer_tokens, DTYPES[dtype], drop_sinks
        batches = texts.batches(text_batch)
        order = np.random.default_rng(seed).permutation(len(batches))
        num_held_out = round(held_out * len(batches))
        self._batches: dict[LivePart, list[NDArray[np.int64]]] = {
            "validation": [batches[index] for index in order[:num_held_out]],
            "training": [batches[index] for index in order[num_held_out:]],
        }
        for part, of_part in self._batches.items():
            if not of_part:
                raise ValueError(
                    f"batches of texts for {part} (0 of {len(batches)}) must be >= 1: take more texts or smaller batches"
                )
        first = 1 if drop_sinks and backend.has_sinks else 0
        self.num_tokens = {
            part: sum(int((texts.length[batch] - first).sum()) for batch in of_part) for part, of_part in self._batches.items()
        }
        one = texts.batch(batches[0][:1])
        self.d_model = backend.activations(one.id_BT, one.is_token_BT, [site])[site].shape[-1]

    def shuffled(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Whole batches of training rows, float32 [batch_size, D], without end: passes over the texts follow each other.

        The order is drawn from (seed, epoch). Batch n is a function of n alone, so a run goes on where it was, but everything
        before ``start`` is computed again, as only the model can tell which rows there are.

        Raises:
            ValueError: no token is left in a whole pass.
        """
        skip, held, num_held = start * batch_size, list[Tensor](), 0
        for rows_ND in self._mixed(seed, epoch):
            skipped = min(skip, len(rows_ND))
            rows_ND, skip = rows_ND[skipped:], skip - skipped
            while num_held + len(rows_ND) >= batch_size:
                head_ND, rows_ND = rows_ND[: batch_size - num_held], rows_ND[batch_size - num_held :]
                yield torch.cat([*held, head_ND]).float()
                held, num_held = [], 0
            if len(rows_ND):
                held, num_held = [*held, rows_ND], num_held + len(rows_ND)

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """The validation rows once, float32 [<= batch_size, D]."""
        held_ND = torch.empty(0, self.d_model, dtype=self._dtype)
        for document in self._batches["validation"]:
            held_ND = torch.cat([held_ND, self._read(document)])
            while len(held_ND) >= batch_size:
                yield held_ND[:batch_size].float()
                held_ND = held_ND[batch_size:]
        if len(held_ND):
            yield held_ND.float()

    def _mixed(self, seed: int, epoch: int) -> Iterator[Tensor]:
        """Rows in random order within windows of buffer_tokens rows and at most those of one batch of texts more.

        There is one buffer, which all windows fill: with windows of their own, of many sizes, the memory of the process would
        grow, as the allocator finds no place for the next one in what the last one has left.
        """
        batches, number = self._batches["training"], 0
        longest = max(int(self.texts.length[batch].sum()) for batch in batches)
        window_ND, num_rows = torch.empty(self.buffer_tokens + longest, self.d_model, dtype=self._dtype), 0
        for num_pass in count():
            num_of_pass = 0
            for index in np.random.default_rng((seed, epoch, 0, num_pass)).permutation(len(batches)):
                rows_ND = self._read(batches[index])
                window_ND[num_rows : num_rows + len(rows_ND)] = rows_ND
                num_rows, num_of_pass = num_rows + len(rows_ND), num_of_pass + len(rows_ND)
                if num_rows >= self.buffer_tokens:
                    yield from _in_random_order(window_ND[:num_rows], (seed, epoch, 1, number))
                    num_rows, number = 0, number + 1
            if num_of_pass == 0:
                raise ValueError(f"tokens kept (0 of {self.num_tokens['training']}) must be >= 1")
            if num_rows:  # a pass ends with a window of its own, so that each row comes once before any comes again
                yield from _in_random_order(window_ND[:num_rows], (seed, epoch, 1, number))
                num_rows, number = 0, number + 1

    def _read(self, document: NDArray[np.int64]) -> Tensor:
        batch = self.texts.batch(document)
        label_B = torch.from_numpy(self.texts.label)[batch.document_B]
        rows = read_rows(self.backend, batch, label_B, [self.site], self._dtype, self._drop_sinks)
        return rows.by_site[self.site]["acts"]


def _in_random_order(rows_ND: Tensor, key: tuple[int, ...]) -> Iterator[Tensor]:
    """All rows, CHUNK at a time."""
    place_N = np.random.default_rng(key).permutation(len(rows_ND))
    for first in range(0, len(rows_ND), CHUNK):
        yield rows_ND[place_N[first : first + CHUNK]]
