"""How alike latents are by the tokens that they share.

Legend: K latents.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from trix.superposition.analysis.sets import IndexSets, flat_sets


def jaccard_from_sets(top_idx: IndexSets, K: int) -> sparse.csr_matrix:
    """J[i, j] = |A_i & A_j| / |A_i | A_j| of the top tokens of K latents, csr float64 [K, K].

    Only pairs that share a token are stored: the product of the sparse membership matrix with its transpose finds them all. The
    diagonal is 1, but 0 for an empty set.

    Raises:
        ValueError: K is not the number of sets.
    """
    if len(top_idx) != K:
        raise ValueError(f"top_idx ({len(top_idx)} sets) must hold K ({K})")
    latent_S, token_S = flat_sets(top_idx)
    tokens, column_S = np.unique(token_S, return_inverse=True)
    member = sparse.coo_matrix((np.ones(len(latent_S)), (latent_S, column_S)), shape=(K, len(tokens))).tocsr()
    member.data[:] = 1.0  # where a list names a token twice, their sum
    jaccard = (member @ member.T).tocsr()
    size_K = np.diff(member.indptr)
    row_S = np.repeat(np.arange(K), np.diff(jaccard.indptr))
    jaccard.data /= size_K[row_S] + size_K[jaccard.indices] - jaccard.data
    return jaccard


def combine_similarity(
    cosW: npt.ArrayLike | sparse.spmatrix,
    corr: npt.ArrayLike | sparse.spmatrix,
    J: npt.ArrayLike | sparse.spmatrix,
    alpha: float = 0.5,
    beta: float = 0.4,
    gamma: float = 0.1,
) -> sparse.csr_matrix:
    """alpha cosW + beta corr + gamma J: csr float64 [K, K].

    Args:
        cosW: cosine similarity of the decoder rows, dense or sparse [K, K].
        corr: correlation of the activations.
        J: Jaccard similarity of the top tokens.

    Raises:
        ValueError: matrices of different shapes, or a value that is not finite: a latent that never fires has no correlation,
            and NaN would reach all that is computed from it.
    """
    parts: dict[str, Any] = {"cosW": cosW, "corr": corr, "J": J}
    total = None
    for (name, part), weight in zip(parts.items(), (alpha, beta, gamma), strict=True):
        matrix = sparse.csr_matrix(part, dtype=np.float64)
        if not np.isfinite(matrix.data).all():
            raise ValueError(f"{name} ({np.count_nonzero(~np.isfinite(matrix.data))} values that are not) must be finite")
        if total is not None and matrix.shape != total.shape:
            raise ValueError(f"{name} {matrix.shape} must have the shape of cosW {total.shape}")
        total = weight * matrix if total is None else total + weight * matrix
    return total
