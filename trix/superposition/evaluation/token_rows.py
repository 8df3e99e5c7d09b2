"""The rows of a dump in the order in which they were written, with the columns that say where each token stood.

Shapes: N tokens, D width of the activations, O width of the targets.
"""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:  # reading dumps needs pydantic, which training does without
    from trix.superposition.dump import ActivationDump
    from trix.superposition.dump.reader import HeldOut, Part

CHUNKS = 16  # read at once: 4096 tokens


class TokenRows(NamedTuple):
    """x_ND, target_NO: float32; the target is x itself, except for a transcoder. The others are int64 [N]."""

    x_ND: Tensor
    target_NO: Tensor
    token_N: Tensor
    document_N: Tensor
    position_N: Tensor
    label_N: Tensor

    @classmethod
    def joined(cls, parts: Iterable["TokenRows"]) -> Self:
        """All rows of the parts, in order; at least one part."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def read_rows(
    dump: "ActivationDump",
    target: "ActivationDump | None" = None,
    part: "Part" = "all",
    held_out: "HeldOut" = 0.0,
    seed: int = 0,
    max_tokens: int | None = None,
) -> Iterator[TokenRows]:
    """The rows of a part, as :meth:`~trix.superposition.dump.ActivationDump.shuffled` splits them, up to 4096 at a time.

    Args:
        target: a second dump of the same tokens, whose activations are the targets. max_tokens: read evenly spaced chunks of
            256 rows that have about so many tokens in all; None: read all.

    Raises:
        ValueError: as :meth:`~trix.superposition.dump.ActivationDump.chunks`.
    """
    from trix.superposition.backends.io_store import column_rows

    chunks = dump.chunks(part, held_out, seed)
    num_rows = int((chunks[:, 2] - chunks[:, 1]).sum())
    if max_tokens is not None and num_rows > max_tokens:
        num_chunks = max(max_tokens * len(chunks) // num_rows, 1)
        chunks = chunks[np.linspace(0, len(chunks) - 1, num_chunks).astype(np.int64)]
    for first in range(0, len(chunks), CHUNKS):
        places = chunks[first : first + CHUNKS].tolist()

        def column(of: "ActivationDump", name: str, places: list[list[int]] = places) -> Tensor:
            return torch.cat([column_rows(of.paths[shard], name, start, stop) for shard, start, stop in places])

        x_ND = column(dump, "acts").float()
        target_NO = x_ND if target is None else column(target, "acts").float()
        yield TokenRows(x_ND, target_NO, *(column(dump, name) for name in ("tokids", "titleidx", "position", "labels")))
