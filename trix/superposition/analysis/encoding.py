"""What analysis and merging ask of a sparse autoencoder, and its latents batch by batch.

Legend: N tokens, B tokens of a batch, D width, K latents.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class SparseCoder(Protocol):
    """An ``nn.Module`` whose ``encode`` maps [N, d_model] to float32 [N, k] >= 0."""

    training: bool

    @property
    def d_model(self) -> int: ...
    @property
    def k(self) -> int: ...
    def encode(self, x_ND: Tensor, /) -> Tensor: ...
    def to(self, device: Any, /) -> Any: ...
    def train(self, mode: bool = True, /) -> Any: ...


def encoded_batches(sae: SparseCoder, batches: Iterable[Tensor], device: torch.device | str) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x_ND, z_NK) of each batch, float32 on the device, without gradients.

    The autoencoder moves to the device and encodes in evaluation mode; afterwards it is in the mode that it was in.

    Raises:
        ValueError: a batch of another width than the autoencoder's, or latents that are not finite.
    """
    was_training = sae.training
    sae.to(device)
    try:
        for batch in batches:
            if batch.ndim != 2 or batch.shape[1] != sae.d_model:
                raise ValueError(f"activations {tuple(batch.shape)} must be [N, d_model ({sae.d_model})]")
            sae.train(False)  # at every batch: whoever takes them may train in between
            x_ND = batch.to(device, torch.float32)
            with torch.no_grad():
                z_NK = sae.encode(x_ND).float()
            if len(z_NK) and not torch.isfinite(z_NK.amax()):  # NaN wins over any number, and latents are >= 0
                raise ValueError("latents must be finite: the activations or the weights hold NaN or infinity")
            yield x_ND, z_NK
    finally:
        sae.train(was_training)


class EncodedRows(NamedTuple):
    """Neighbouring tokens. start: number of the first one among the tokens of all files. columns: int64 [B], by name."""

    start: int
    z_BK: Tensor
    columns: dict[str, Tensor]


def encoded_rows(
    sae: SparseCoder,
    act_files: Sequence[Path | str],
    tok_files: Sequence[Path | str],
    columns: Sequence[str],
    device: torch.device | str,
    batch: int,
) -> Iterator[EncodedRows]:
    """The latents of all tokens in order, with columns of the dump; no batch reaches over the end of a file.

    Args:
        tok_files: for each of act_files the file with the columns of the same tokens; they may be the same files.
        columns: names of integer columns. batch: tokens encoded at once.

    Raises:
        ValueError: files or columns that do not fit each other, a column that is not int [N], and as :func:`encoded_batches`.
    """
    from trix.superposition.backends.io_store import column_rows, num_rows  # its package needs pydantic, which maps do not

    if len(act_files) != len(tok_files):
        raise ValueError(f"tok_files ({len(tok_files)}) must be as many as act_files ({len(act_files)})")
    parts = []
    for act_path, tok_path in zip(act_files, tok_files, strict=True):
        num_acts = num_rows(act_path)
        for name in columns:
            given = num_rows(tok_path, name)
            if given != num_acts:
                raise ValueError(f"{tok_path}: {name} ({given} tokens) must be of as many tokens as {act_path} ({num_acts})")
        for start in range(0, num_acts, batch):
            parts.append((act_path, tok_path, start, min(start + batch, num_acts)))
    acts = (column_rows(act_path, "acts", start, stop) for act_path, _, start, stop in parts)
    num_seen = 0
    for (_, tok_path, start, stop), (_, z_BK) in zip(parts, encoded_batches(sae, acts, device), strict=True):
        found = {name: column_rows(tok_path, name, start, stop) for name in columns}
        for name, column_B in found.items():
            if column_B.ndim != 1 or column_B.dtype.is_floating_point:
                kind = str(column_B.dtype).removeprefix("torch.")
                raise ValueError(f"{tok_path}: {name} ({kind} {tuple(column_B.shape)}) must be int [N]")
        yield EncodedRows(num_seen, z_BK, {name: column_B.long() for name, column_B in found.items()})
        num_seen += stop - start
