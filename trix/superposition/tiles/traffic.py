"""What is known of the tokens of a dump: their latents, tiles, ids and documents.

Legend: N tokens, P documents, D width, K latents, E tiles.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from trix.superposition.analysis.encoding import SparseCoder, encoded_batches
from trix.superposition.backends.base_model import CausalLMBackend, Site

if TYPE_CHECKING:
    from trix.superposition.dump import ActivationDump

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

TILE = "tile"
BATCH_TOKENS = 8192
BATCH_DOCUMENTS = 64


class DecodingCoder(SparseCoder, Protocol):
    """An autoencoder with a decoder of one row for each latent."""

    W_dec: Any


@dataclass(frozen=True)
class Traffic:
    """Tokens of whole documents, those of a document next to each other and in order.

    Attributes:
        x_ND: activations, float32. latent_NK: csr of float32, an entry for each active latent. tile_N, token_N, document_N,
            position_N: int64, the best tile of each token, its id, its document, its place there. num_tiles: E.

    Raises:
        ValueError: numbers of tokens that differ, no tokens, a tile outside [0, E), or a document in two pieces.
    """

    x_ND: Tensor
    latent_NK: sparse.csr_matrix
    tile_N: IntArray
    token_N: IntArray
    document_N: IntArray
    position_N: IntArray
    num_tiles: int

    def __post_init__(self) -> None:
        num_tokens = len(self.x_ND)
        columns = (self.tile_N, self.token_N, self.document_N, self.position_N)
        sizes = [num_tokens, self.latent_NK.shape[0], *map(len, columns)]
        if num_tokens == 0 or len(set(sizes)) > 1:
            raise ValueError(f"numbers of tokens ({', '.join(map(str, sizes))}) must be equal, and >= 1")
        if not 0 <= self.tile_N.min() <= self.tile_N.max() < self.num_tiles:
            raise ValueError(
                f"tiles ({self.tile_N.min()} to {self.tile_N.max()}) must be >= 0 and < number of tiles ({self.num_tiles})"
            )
        starts = np.flatnonzero(np.diff(self.document_N, prepend=self.document_N[0] - 1))
        if len(np.unique(self.document_N[starts])) < len(starts):
            raise ValueError("tokens of a document must be next to each other")

    @property
    def num_tokens(self) -> int:
        return len(self.tile_N)

    @property
    def num_latents(self) -> int:
        return int(self.latent_NK.shape[1])

    @property
    def starts_P(self) -> IntArray:  # noqa: N802
        """The first token of each document."""
        return np.flatnonzero(np.diff(self.document_N, prepend=self.document_N[0] - 1))

    def rows(self, is_kept_N: BoolArray) -> "Traffic":
        """The tokens where the mask is True."""
        columns = ("latent_NK", "tile_N", "token_N", "document_N", "position_N")
        kept = {name: getattr(self, name)[is_kept_N] for name in columns}
        return replace(self, x_ND=self.x_ND[torch.from_numpy(is_kept_N)], **kept)

    def split(self, held_out: float = 0.3, seed: int = 0) -> tuple["Traffic", "Traffic"]:
        """(training, held out): the documents are drawn, at least one for each part.

        Raises:
            ValueError: held_out outside (0, 1), or a single document.
        """
        documents = np.unique(self.document_N)
        if not 0 < held_out < 1 or len(documents) < 2:
            raise ValueError(f"held_out ({held_out}) must be > 0 and < 1, number of documents ({len(documents)}) >= 2")
        num_held_out = min(max(round(held_out * len(documents)), 1), len(documents) - 1)
        drawn = np.random.default_rng(seed).permutation(documents)[:num_held_out]
        is_held_out_N = np.isin(self.document_N, drawn)
        return self.rows(~is_held_out_N), self.rows(is_held_out_N)

    def shifted(self, seed: int = 0) -> "Traffic":
        """The control: in each document the tiles are shifted circularly by a number drawn from 1 to its length - 1.

        Each document keeps its tiles and their order; which token has which tile is lost. A document of one token stays.
        """
        length_P = np.diff([*self.starts_P, self.num_tokens])
        shift_P = np.random.default_rng(seed).integers(1, np.maximum(length_P, 2))
        place_N = np.arange(self.num_tokens) - np.repeat(self.starts_P, length_P)
        length_N = np.repeat(length_P, length_P)
        from_N = np.repeat(self.starts_P, length_P) + (place_N + np.repeat(shift_P, length_P)) % length_N
        return replace(self, tile_N=self.tile_N[from_N])

    def has_whole_documents(self) -> bool:
        """Whether no token of a document was left out of the dump, so that its end alone may be missing."""
        return bool((self.position_N == np.arange(self.num_tokens) - self._first_N()).all())

    def padded(self, documents: Sequence[int], values: Tensor) -> tuple[Tensor, Tensor]:
        """Values [N, ...] of some documents, by place among all: ([B, T, ...] with 0 for padding, mask bool [B, T])."""
        bounds = [*self.starts_P, self.num_tokens]
        parts = [values[bounds[index] : bounds[index + 1]] for index in documents]
        rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts], batch_first=True)
        return rows, mask

    def _first_N(self) -> IntArray:  # noqa: N802
        return np.repeat(self.starts_P, np.diff([*self.starts_P, self.num_tokens]))


def read_traffic(sae: SparseCoder, dump: "ActivationDump", num_tiles: int, num_tokens: int | None = None) -> Traffic:
    """The tokens of the first documents of a dump, in its order, which is drawn.

    Args:
        num_tokens: the most tokens to read; documents are whole, and the first is read whatever its length. None: all.

    Raises:
        ValueError: a dump without tiles, an autoencoder of another width, num_tokens < 1.
    """
    from trix.superposition.dump import stream_shards

    if num_tokens is not None and num_tokens < 1:
        raise ValueError(f"num_tokens ({num_tokens}) must be >= 1")
    columns = {name: dump.column(name).numpy() for name in (TILE, "tokids", "titleidx", "position")}
    ends = np.flatnonzero(np.diff(columns["titleidx"], append=-1)) + 1
    limit = len(dump) if num_tokens is None else num_tokens
    total = int(ends[max(int(np.searchsorted(ends, limit, side="right")) - 1, 0)])
    parts_x: list[Tensor] = []
    parts_z: list[sparse.csr_matrix] = []
    num_read = 0
    for x_BD, z_BK in encoded_batches(sae, stream_shards(dump.paths, batch=BATCH_TOKENS), "cpu"):
        parts_x.append(x_BD[: total - num_read])
        parts_z.append(sparse.csr_matrix(z_BK[: total - num_read].numpy()))
        num_read += len(parts_x[-1])
        if num_read == total:
            break
    kept = {name: value[:total] for name, value in columns.items()}
    latent_NK = sparse.vstack(parts_z, format="csr")
    columns_N = (kept[TILE], kept["tokids"], kept["titleidx"], kept["position"])
    return Traffic(torch.cat(parts_x), latent_NK, *columns_N, num_tiles)


def with_tiles_of(traffic: Traffic, backend: CausalLMBackend, layer: int, num_tiles: int) -> Traffic:
    """The same tokens with their tiles in another layer, for which the model runs on the documents again.

    Raises:
        ValueError: documents of which a token was left out, or a layer without tiles.
    """
    if not traffic.has_whole_documents():
        raise ValueError("documents of the dump must be whole for their tiles in another layer: tokens were left out")
    token_N, site = torch.from_numpy(traffic.token_N), Site(layer, TILE)
    parts: list[Tensor] = []
    for first in range(0, len(traffic.starts_P), BATCH_DOCUMENTS):
        documents = range(first, min(first + BATCH_DOCUMENTS, len(traffic.starts_P)))
        token_BT, mask_BT = traffic.padded(documents, token_N)
        tile_BT = backend.activations(token_BT, mask_BT.long(), [site])[site]
        parts.append(tile_BT.cpu()[mask_BT])
    return replace(traffic, tile_N=torch.cat(parts).numpy(), num_tiles=num_tiles)


def decoder_rows(sae: DecodingCoder) -> Tensor:
    """What a latent of 1 adds to the activation: float32 [K, D], the scale of the autoencoder taken in."""
    weight_KD: Tensor = sae.W_dec.detach().float() / getattr(sae, "output_scale", 1.0)
    return weight_KD
