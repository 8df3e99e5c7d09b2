"""Rows that come in parts of any size, as batches of one size.

N tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from mmap import mmap

import torch
from torch import Tensor


def in_batches(parts: Iterable[Mapping[str, Tensor]], batch_size: int, total: int | None = None) -> Iterator[dict[str, Tensor]]:
    """All rows of the parts in order, batch_size at a time; only the last batch may be shorter. acts are given as float32.

    Each row is copied once, into memory of the batch's own. So a part may be a view of a buffer that the next part overwrites.

    Args:
        total: rows of all parts, where that is known: then the last batch takes no more memory than its rows.
    """
    batch: dict[str, Tensor] = {}
    fill, size = 0, batch_size
    for part in parts:
        rows, first = len(next(iter(part.values()))), 0
        while first < rows:
            if not batch:
                size = batch_size if total is None else min(batch_size, total)
                batch = {name: _empty(name, column_N, size) for name, column_N in part.items()}
            stop = min(first + size - fill, rows)
            for name, column_N in part.items():
                batch[name][fill : fill + stop - first] = column_N[first:stop]
            fill, first = fill + stop - first, stop
            if fill == size:
                yield batch
                batch, fill, total = {}, 0, None if total is None else total - size
    if fill:
        yield {name: column_N[:fill] for name, column_N in batch.items()}


def own_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor on the CPU in pages of its own, all 0, which go back to the system with the tensor.

    A large tensor on the allocator's heap that outlives its neighbours leaves gaps that later tensors do not fit into, and the
    memory of the process grows.
    """
    size = prod(shape)
    return torch.frombuffer(mmap(-1, dtype.itemsize * max(size, 1)), dtype=dtype)[:size].view(*shape)


def _empty(name: str, column_N: Tensor, rows: int) -> Tensor:
    return own_pages((rows, *column_N.shape[1:]), torch.float32 if name == "acts" else column_N.dtype)
