"""The tokens that activate each latent most.

Legend: N tokens, B tokens of a batch, K latents, A top tokens kept of each latent, S candidates.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trix.superposition.analysis.encoding import SparseCoder, encoded_batches

MAX_CANDIDATES = 1 << 20  # entries that are gathered before they are sorted: 24 MB


class TopTokens(Sequence[frozenset[int]]):
    """The top tokens of K latents: a sequence of K sets of token indices, with their order and activations at hand.

    ``idx_KA`` (int64) and ``value_KA`` (float32), both on the CPU, are sorted: the largest activation first, equal ones by
    index. A token's index is its place in all shards together. Latents with fewer than A active tokens have -1 and 0 in the
    places left.
    """

    def __init__(self, idx_KA: Tensor, value_KA: Tensor) -> None:
        if idx_KA.ndim != 2 or idx_KA.shape != value_KA.shape:
            raise ValueError(f"idx {tuple(idx_KA.shape)} and value {tuple(value_KA.shape)} must both be [K, A]")
        self.idx_KA = idx_KA
        self.value_KA = value_KA

    def __len__(self) -> int:
        return len(self.idx_KA)

    @overload
    def __getitem__(self, latent: int) -> frozenset[int]: ...
    @overload
    def __getitem__(self, latent: slice) -> "TopTokens": ...
    def __getitem__(self, latent: int | slice) -> "frozenset[int] | TopTokens":
        if isinstance(latent, slice):
            return TopTokens(self.idx_KA[latent], self.value_KA[latent])
        idx_A = self.idx_KA[latent]
        return frozenset(idx_A[idx_A >= 0].tolist())

    def __iter__(self) -> Iterator[frozenset[int]]:
        return (self[latent] for latent in range(len(self)))


def topk_sets_per_latent(
    sae: SparseCoder, act_files: Sequence[Path | str], device: torch.device | str, k: int = 200, batch: int = 16384
) -> TopTokens:
    """The k tokens with the largest activation z > 0 of each latent, as :class:`TopTokens` [K, k].

    Of equal activations the one with the lower token index wins, whatever the batches and shards are. A token on which a latent
    is not active is never among its top tokens, so a latent that never fires has an empty set.

    Args:
        act_files: shards in the order of their tokens.
        k: tokens kept of each latent.
        batch: tokens encoded at once.

    Raises:
        ValueError: k < 1, or shards that do not fit the autoencoder.
    """
    return _top_tokens(sae, act_files, device, k, batch, slice(None))


def top1_tokens_for_latents(
    sae: SparseCoder,
    medoids: npt.ArrayLike | Tensor,
    act_files: Sequence[Path | str],
    tok_files: Sequence[Path | str],
    device: torch.device | str,
    batch: int = 16384,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The vocabulary index of the token that activates each given latent most, and that activation.

    Ties as in :func:`topk_sets_per_latent`. A latent that never fires has token -1 and activation 0.

    Args:
        medoids: latents [M], int.
        tok_files: shards with the token ids of `act_files`, in the same order; they may be the same files.

    Returns:
        (ids, values): int64 [M] and float32 [M].

    Raises:
        ValueError: a latent that is not one of the autoencoder's, or shards with other numbers of tokens.
    """
    from trix.superposition.backends.io_store import read_column
    from trix.superposition.dump import build_offsets

    latents = torch.as_tensor(medoids, dtype=torch.int64).flatten().to(device)
    if len(latents) and (latents.min() < 0 or latents.max() >= sae.k):
        raise ValueError(f"latents ({latents.min()} to {latents.max()}) must be >= 0 and < {sae.k}")
    top = _top_tokens(sae, act_files, device, 1, batch, latents)
    idx_M, value_M = top.idx_KA[:, 0], top.value_KA[:, 0]
    ids_N = torch.cat([read_column(path, "tokids").long() for path in tok_files])
    num_tokens = int(build_offsets(act_files)[-1])
    if len(ids_N) != num_tokens:
        raise ValueError(f"tok_files ({len(ids_N)} tokens) must hold as many tokens as act_files ({num_tokens})")
    ids_M = torch.where(idx_M >= 0, ids_N[idx_M.clamp(min=0)], -1) if len(ids_N) else torch.full_like(idx_M, -1)
    return ids_M.numpy(), value_M.numpy()


def _top_tokens(
    sae: SparseCoder,
    act_files: Sequence[Path | str],
    device: torch.device | str,
    k: int,
    batch: int,
    latents: Tensor | slice,
) -> TopTokens:
    from trix.superposition.dump import stream_shards  # its settings need pydantic, which the rest of the analysis does not

    if k < 1:
        raise ValueError(f"k ({k}) must be >= 1")
    num_latents = sae.k if isinstance(latents, slice) else len(latents)
    best = Candidates(num_latents, k, device)
    num_seen = 0
    for _, z_BK in encoded_batches(sae, stream_shards(act_files, batch=batch), device):
        for rows_BK in torch.split(z_BK[:, latents], max(1, MAX_CANDIDATES // max(1, num_latents))):
            token_S, latent_S = torch.nonzero(rows_BK > best.least_K, as_tuple=True)
            value_S = rows_BK[token_S, latent_S]
            best.add(latent_S, token_S + num_seen, value_S, value_S)
            num_seen += len(rows_BK)
    return TopTokens(*best.kept())


class Candidates:
    """The entries of each latent with the largest keys; of equal keys the first that was added. Sorted only when there are
    many.

    Args:
        num_latents: K. num_kept: A, entries that are kept of each latent.

    Attributes:
        least_K: what the key of a further entry has to exceed.
    """

    def __init__(self, num_latents: int, num_kept: int, device: torch.device | str) -> None:
        self.num_latents, self.num_kept = num_latents, num_kept
        integers, floats = torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, device=device)
        self.parts = [(integers, integers, floats, floats)]
        self.least_K = torch.zeros(num_latents, device=device)

    def add(self, latent_S: Tensor, token_S: Tensor, key_S: Tensor, value_S: Tensor) -> None:
        """Add entries. latent_S, token_S: int64. key_S: float32 > 0. value_S: float32, what is noted of each."""
        self.parts.append((latent_S, token_S, key_S, value_S))
        if sum(len(part[0]) for part in self.parts) > MAX_CANDIDATES + self.num_latents * self.num_kept:
            self._keep_best()

    def kept(self) -> tuple[Tensor, Tensor]:
        """(idx_KA, value_KA) on the CPU: the tokens of each latent, the largest key first, and their values.

        Latents with fewer than A entries have -1 and 0 in the places left.
        """
        place_S = self._keep_best()
        latent_S, token_S, _, value_S = self.parts[0]
        idx_KA = torch.full((self.num_latents, self.num_kept), -1)
        value_KA = torch.zeros(self.num_latents, self.num_kept)
        idx_KA[latent_S.cpu(), place_S.cpu()] = token_S.cpu()
        value_KA[latent_S.cpu(), place_S.cpu()] = value_S.cpu()
        return idx_KA, value_KA

    def _keep_best(self) -> Tensor:
        """Leave the best entries of each latent, in order; returns the place of each."""
        latent_S, token_S, key_S, value_S = (torch.cat(column) for column in zip(*self.parts, strict=True))
        # By latent, then by key: floats > 0 are in the order of their bits. A stable sort leaves equal keys in the order in
        # which they were added.
        order_S = (latent_S * 2**32 - key_S.view(torch.int32)).argsort(stable=True)
        latent_S = latent_S[order_S]
        count_K = torch.bincount(latent_S, minlength=self.num_latents)
        place_S = torch.arange(len(latent_S), device=latent_S.device) - (count_K.cumsum(0) - count_K)[latent_S]
        is_kept_S = place_S < self.num_kept
        latent_S, place_S, order_S = latent_S[is_kept_S], place_S[is_kept_S], order_S[is_kept_S]
        self.parts = [(latent_S, token_S[order_S], key_S[order_S], value_S[order_S])]
        is_last_S = place_S == self.num_kept - 1
        self.least_K[latent_S[is_last_S]] = self.parts[0][2][is_last_S]
        return place_S
