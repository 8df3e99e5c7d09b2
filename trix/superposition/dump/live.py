"""Activations straight from a model, shuffled in bounded memory: nothing is written to disk.

N tokens, D width.
"""

from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trix.superposition.backends.base_model import DTYPES, CausalLMBackend, Site
from trix.superposition.config import DTypeName, DumpConfig
from trix.superposition.dump.activations import identities, write_batches
from trix.superposition.dump.batch_rows import RowReader
from trix.superposition.dump.batching import in_batches, own_pages
from trix.superposition.dump.manifest import Identity
from trix.superposition.dump.reader import ActivationDump
from trix.superposition.dump.texts import TokenizedTexts
from trix.superposition.dump.writer import ShardWriter

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
        text_batch: as given. d_model: D. num_tokens: of each part; sinks, except first positions, and broken values are among
            them, as only the model can tell.

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
        self.backend, self.texts, self.site, self.text_batch = backend, texts, site, text_batch
        self.buffer_tokens, self._dtype_name, self._dtype, self._drop_sinks = buffer_tokens, dtype, DTYPES[dtype], drop_sinks
        self._reader = RowReader(backend, [site], self._dtype, drop_sinks)
        batches, length = texts.batches(text_batch), texts.length
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
            part: sum(int((length[batch] - first).sum()) for batch in of_part) for part, of_part in self._batches.items()
        }
        # What takes the most memory comes first: if it is too much, that is known at once, and later texts find room.
        largest = max(batches, key=lambda batch: len(batch) * int(length[batch].max()))
        self.d_model = self._read(largest).shape[1]

    def shuffled(self, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[Tensor]:
        """Whole batches of training rows, float32 [batch_size, D], without end: passes over the texts follow each other.

        The order is drawn from (seed, epoch). Batch n is a function of n alone, so a run goes on where it was, but everything
        before ``start`` is computed again, as only the model can tell which rows there are.

        Raises:
            ValueError: no token is left in a whole pass.
        """
        return (batch["acts"] for batch in in_batches(self._mixed(seed, epoch, start * batch_size), batch_size))

    def in_order(self, batch_size: int) -> Iterator[Tensor]:
        """The validation rows once, float32 [<= batch_size, D]."""
        parts = ({"acts": self._read(document).clone()} for document in self._batches["validation"])
        return (batch["acts"] for batch in in_batches(parts, batch_size))

    def identity(self, max_len: int) -> Identity:
        """What a dump of all texts would be of. max_len: to how many tokens the texts were cut."""
        return identities(self.texts, self.backend, self._dump_config(max_len), [self.site])[self.site]

    def dump(self, folder: Path, num_tokens: int, max_len: int) -> tuple[ActivationDump, NDArray[np.int64]]:
        """Write the rows of the first batches of texts of each part: of validation until they have half of num_tokens, then of
        training until all have num_tokens.

        Returns:
            The dump, and the numbers of the documents that are held out.

        Raises:
            ValueError: no token is left. OSError: a file cannot be written.
        """
        held_out = self._first("validation", num_tokens // 2)
        length = self.texts.length
        used = sum(int(length[batch].sum()) for batch in held_out)
        batches = [*held_out, *self._first("training", num_tokens - used)]
        total = sum(int(length[batch].sum()) for batch in batches)
        identity = {self.site: self.identity(max_len)}
        writer = ShardWriter({self.site: folder}, identity, sum(map(len, batches)), 0, total, strict=False)
        write_batches(writer, self._reader, self.texts, batches)
        return ActivationDump(folder), np.concatenate(held_out)

    def _first(self, part: LivePart, num_tokens: int) -> list[NDArray[np.int64]]:
        """The first batches of a part, at least one, until they have num_tokens."""
        length = self.texts.length
        ends = np.cumsum([length[batch].sum() for batch in self._batches[part]])
        return self._batches[part][: int(np.searchsorted(ends, num_tokens)) + 1]

    def _dump_config(self, max_len: int) -> DumpConfig:
        return DumpConfig(
            layer=self.site.layer,
            max_len=max_len,
            batch_size=self.text_batch,
            dtype=self._dtype_name,
            drop_sinks=self._drop_sinks,
        )

    def _mixed(self, seed: int, epoch: int, skip: int) -> Iterator[dict[str, Tensor]]:
        """Rows in random order within windows of buffer_tokens rows and at most those of one batch of texts more, without the
        first ``skip`` rows. At most CHUNK of them are given at a time, all in one buffer.

        There is one window, which is filled again and again.
        """
        batches, length, number = self._batches["training"], self.texts.length, 0
        longest = max(int(length[batch].sum()) for batch in batches)
        window_ND, num_rows = own_pages((self.buffer_tokens + longest, self.d_model), self._dtype), 0
        given_ND = own_pages((CHUNK, self.d_model), self._dtype)
        for num_pass in count():
            num_of_pass, order = 0, np.random.default_rng((seed, epoch, 0, num_pass)).permutation(len(batches))
            for place, index in enumerate(order, start=1):
                rows_ND = self._read(batches[index])
                window_ND[num_rows : num_rows + len(rows_ND)] = rows_ND
                num_rows, num_of_pass = num_rows + len(rows_ND), num_of_pass + len(rows_ND)
                # A pass ends with a window of its own, so that each row comes once before any comes again.
                if num_rows >= self.buffer_tokens or (num_rows and place == len(order)):
                    place_N = torch.from_numpy(np.random.default_rng((seed, epoch, 1, number)).permutation(num_rows))
                    for place_C in torch.split(place_N[min(skip, num_rows) :], CHUNK):
                        yield {"acts": torch.index_select(window_ND, 0, place_C, out=given_ND[: len(place_C)])}
                    skip -= min(skip, num_rows)
                    num_rows, number = 0, number + 1
            if num_of_pass == 0:
                raise ValueError(f"tokens kept (0 of {self.num_tokens['training']}) must be >= 1")

    def _read(self, document: NDArray[np.int64]) -> Tensor:
        """The rows of some texts; they hold until others are read."""
        batch = self.texts.batch(document)
        label_B = torch.from_numpy(self.texts.label)[batch.document_B]
        return self._reader.read(batch, label_B).by_site[self.site]["acts"]
