"""How much a latent says of the tile, in bits, also where the token is known.

Legend: N tokens, K latents, V different values that are given, Q different pairs of a value and a tile, U triples of a latent,
a value and a tile that occur, W pairs of a latent and a value that occur.
"""

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trix.superposition.tiles.traffic import IntArray

FloatArray = npt.NDArray[np.float64]


def latent_information(latent_NK: sparse.csr_matrix, tile_N: IntArray, given_N: IntArray | None = None) -> FloatArray:
    """I(A_k; tile | given) of each latent in bits, float64 [K], where A_k says whether latent k is active.

        I = sum over a, tile, g of p(a, tile, g) log2 (p(a, tile, g) p(g) / (p(a, g) p(tile, g)))

    Probabilities are shares of the tokens. They are estimates, so the value is above 0 even where there is nothing to find.
    Compare it with the value for tiles that were permuted.

    Args:
        latent_NK: an entry for each active latent. tile_N, given_N: int >= 0. given_N None: I(A_k; tile).

    Raises:
        ValueError: numbers of tokens that differ.
    """
    num_tokens, num_latents = latent_NK.shape
    given_N = np.zeros(num_tokens, dtype=np.int64) if given_N is None else given_N
    if not len(tile_N) == len(given_N) == num_tokens >= 1:
        raise ValueError(f"tiles ({len(tile_N)}) and given ({len(given_N)}) must be as many as the tokens ({num_tokens}), >= 1")
    _, given_N = np.unique(given_N, return_inverse=True)
    n_V = np.bincount(given_N)
    num_tiles = int(tile_N.max()) + 1
    pair_Q, pair_N, n_Q = np.unique(given_N * num_tiles + tile_N, return_inverse=True, return_counts=True)

    active = latent_NK.tocoo()
    cell_U, active_U = np.unique(active.col.astype(np.int64) * len(pair_Q) + pair_N[active.row], return_counts=True)
    latent_U, pair_U = np.divmod(cell_U, len(pair_Q))
    value_W, group_U = np.unique(latent_U * len(n_V) + pair_Q[pair_U] // num_tiles, return_inverse=True)
    latent_W, given_W = np.divmod(value_W, len(n_V))
    active_W = np.bincount(group_U, weights=active_U)

    # Counts of tokens on which the latent is active, and of those on which it is not, with the same tile and value.
    passive_U, all_U, all_W = n_Q[pair_U] - active_U, n_Q[pair_U], n_V[given_W].astype(np.float64)
    passive_W = all_W - active_W
    bits_U = _xlog2(active_U, active_U * all_W[group_U], all_U * active_W[group_U])
    bits_U += _xlog2(passive_U, passive_U * all_W[group_U], all_U * passive_W[group_U])
    # Tiles that the latent never meets at a value: p(0, tile, g) = p(tile, g), so that they share one logarithm.
    unmet_W = all_W - np.bincount(group_U, weights=all_U)
    bits_W = _xlog2(unmet_W, all_W, passive_W)
    total_K = np.bincount(latent_U, weights=bits_U, minlength=num_latents)
    total_K += np.bincount(latent_W, weights=bits_W, minlength=num_latents)
    return np.maximum(total_K / num_tokens, 0.0)


def permuted_within(tile_N: IntArray, given_N: IntArray, seed: int = 0) -> IntArray:
    """The control of I(A; tile | given): the tiles of the tokens of each given value in random order, int64 [N].

    Which tiles a value goes to, and how often, stays; all else that they depended on is lost.
    """
    noise_N = np.random.default_rng(seed).random(len(tile_N))
    permuted_N = np.empty_like(tile_N)
    permuted_N[np.argsort(given_N, kind="stable")] = tile_N[np.lexsort((noise_N, given_N))]
    return permuted_N


def tile_entropy(tile_N: IntArray, given_N: IntArray | None = None) -> float:
    """H(tile | given) in bits, or H(tile): 0 where the given value decides the tile."""
    given_N = np.zeros_like(tile_N) if given_N is None else given_N
    _, given_N, n_V = np.unique(given_N, return_inverse=True, return_counts=True)
    num_tiles = int(tile_N.max()) + 1
    pair_Q, n_Q = np.unique(given_N * num_tiles + tile_N, return_counts=True)
    return float((n_Q * np.log2(n_V[pair_Q // num_tiles] / n_Q)).sum() / len(tile_N))


def _xlog2(count: npt.ArrayLike, above: npt.ArrayLike, below: npt.ArrayLike) -> FloatArray:
    """count log2(above / below), and 0 where the count is 0."""
    count_C = np.asarray(count, dtype=np.float64)
    ratio_C: FloatArray = np.divide(above, below, out=np.ones(count_C.shape), where=count_C > 0)
    return count_C * np.log2(ratio_C)
