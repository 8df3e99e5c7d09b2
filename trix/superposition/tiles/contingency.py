"""Which latents are active where which tile is chosen.

Legend: N tokens, P documents, K latents, E tiles, S pairs of a latent and a document in which it is active.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trix.superposition.analysis.fisher import fisher_exact_many
from trix.superposition.tiles.information import latent_information, permuted_within
from trix.superposition.tiles.traffic import BoolArray, IntArray, Traffic

FloatArray = npt.NDArray[np.float64]

FALSE_DISCOVERY_RATE = 0.05


class Contingency(NamedTuple):
    """The tests of K latents against E tiles, and what tokens say.

    num_documents_K: documents in which the latent is active. hits_KE: those of them in which the tile is that of the token on
    which the latent is most active. control_hits_KE: those in which it is that of a token drawn from the document. p_KE: of
    Fisher's test, one-sided: the tile is chosen more often where the latent is active. q_KE: p-value adjusted over all K E
    tests by Benjamini and Hochberg. is_tested_KE: False where neither token of any document has the tile; there p is 1.
    count_KE: tokens with the tile on which the latent is active. pmi_KE: log2 P(active, tile) / (P(active) P(tile)), -inf
    without such a token, NaN for a latent that is never active or a tile without tokens.
    """

    num_documents_K: IntArray
    hits_KE: IntArray
    control_hits_KE: IntArray
    p_KE: FloatArray
    q_KE: FloatArray
    is_tested_KE: BoolArray
    count_KE: IntArray
    pmi_KE: FloatArray

    @property
    def is_discovery_KE(self) -> BoolArray:  # noqa: N802
        """Tests with q <= .05."""
        return self.q_KE <= FALSE_DISCOVERY_RATE

    def discovery_rate(self) -> float:
        """Share of the tests that are discoveries, of those that could be made; 0 without one."""
        return float(self.is_discovery_KE.sum() / max(int(self.is_tested_KE.sum()), 1))

    def top_latents(self, tile: int, num_latents: int) -> list[int]:
        """The latents that are enriched on a tile, the strongest first: discoveries, by count times pmi, which is their part of
        the information between latents and tiles. There may be fewer than asked for."""
        found = np.flatnonzero(self.is_discovery_KE[:, tile])
        share = self.count_KE[found, tile] * self.pmi_KE[found, tile]
        return [int(latent) for latent in found[np.argsort(-share, kind="stable")][:num_latents]]


class Information(NamedTuple):
    """What a latent says of the tile, in bits, float64 [K] each; see :func:`~.information.latent_information`.

    tile_K: I(active; tile). control_K: the same after the tiles were shifted circularly within documents. given_token_K:
    I(active; tile | token). given_control_K: the same after the tiles of each token id were permuted.
    """

    tile_K: FloatArray
    control_K: FloatArray
    given_token_K: FloatArray
    given_control_K: FloatArray


def contingency(traffic: Traffic, seed: int = 0) -> Contingency:
    """Test for each latent and tile whether the tile is chosen more often where the latent is active.

    The unit is the document: each document in which the latent is active gives the token on which it is most active (of equal
    ones the first), and a token drawn from all of its tokens. The test compares how many of the former and of the latter have
    the tile. Both come from the same documents, so what distinguishes documents makes no discovery, and neither do the many
    tokens of one document. With tiles shifted within documents (:meth:`~.traffic.Traffic.shifted`) both are random tokens.

    Args:
        seed: seed of the draw of tokens.
    """
    num_latents, num_tiles = traffic.num_latents, traffic.num_tiles
    active = traffic.latent_NK.tocoo()
    document_N = np.repeat(np.arange(len(traffic.starts_P)), np.diff([*traffic.starts_P, traffic.num_tokens]))
    order = np.lexsort((active.row, -active.data, document_N[active.row], active.col))
    latent_S, token_S = active.col[order].astype(np.int64), active.row[order].astype(np.int64)
    is_first = np.diff(latent_S * len(traffic.starts_P) + document_N[token_S], prepend=-1) > 0
    latent_S, token_S = latent_S[is_first], token_S[is_first]

    start_P = traffic.starts_P
    length_P = np.diff([*start_P, traffic.num_tokens])
    document_S = document_N[token_S]
    drawn_S = start_P[document_S] + np.random.default_rng(seed).integers(0, length_P[document_S])

    num_documents_K = np.bincount(latent_S, minlength=num_latents)
    hits_KE, control_KE = (_table(latent_S, traffic.tile_N[token], num_latents, num_tiles) for token in (token_S, drawn_S))
    p_KE = np.ones(hits_KE.shape)
    for num_documents in np.unique(num_documents_K[num_documents_K > 0]):
        rows = num_documents_K == num_documents
        marked = hits_KE[rows] + control_KE[rows]
        p_KE[rows] = fisher_exact_many(hits_KE[rows], num_documents, marked, 2 * int(num_documents), "greater")
    count_KE = _table(active.col.astype(np.int64), traffic.tile_N[active.row], num_latents, num_tiles)
    return Contingency(
        num_documents_K,
        hits_KE,
        control_KE,
        p_KE,
        _adjusted(p_KE),
        hits_KE + control_KE > 0,
        count_KE,
        _pmi(count_KE, traffic),
    )


def information(traffic: Traffic, seed: int = 0) -> Information:
    """What each latent says of the tile, alone and where the token is known, each next to its control."""
    latent_NK, tile_N, token_N = traffic.latent_NK, traffic.tile_N, traffic.token_N
    return Information(
        latent_information(latent_NK, tile_N),
        latent_information(latent_NK, traffic.shifted(seed).tile_N),
        latent_information(latent_NK, tile_N, token_N),
        latent_information(latent_NK, permuted_within(tile_N, token_N, seed), token_N),
    )


def _table(latent_S: IntArray, tile_S: IntArray, num_latents: int, num_tiles: int) -> IntArray:
    return np.bincount(latent_S * num_tiles + tile_S, minlength=num_latents * num_tiles).reshape(num_latents, num_tiles)


def _pmi(count_KE: IntArray, traffic: Traffic) -> FloatArray:
    active_K1 = sparse.csr_matrix(traffic.latent_NK).getnnz(axis=0)[:, None].astype(np.float64)
    tokens_E = np.bincount(traffic.tile_N, minlength=traffic.num_tiles).astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        pmi_KE: FloatArray = np.log2(count_KE * traffic.num_tokens / (active_K1 * tokens_E))
    return pmi_KE


def _adjusted(p_KE: FloatArray) -> FloatArray:
    from scipy.stats import false_discovery_control  # scipy.stats takes a second to load

    q_KE: FloatArray = false_discovery_control(p_KE, axis=None).reshape(p_KE.shape)
    return q_KE
