"""Sets of indices, one for each latent, as flat arrays.

Legend: K latents, S members of all sets together.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from trix.superposition.analysis.top_tokens import TopTokens

IndexSets = TopTokens | Sequence[Iterable[int]]


def flat_sets(top_idx: IndexSets) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(latent_S, index_S), int64, of the members of all sets, sorted by latent.

    Raises:
        ValueError: an index < 0.
    """
    if isinstance(top_idx, TopTokens):
        idx_KA = top_idx.idx_KA.numpy()
        latent_S, place_S = np.nonzero(idx_KA >= 0)
        return latent_S, idx_KA[latent_S, place_S]
    sets = [np.fromiter(members, np.int64) for members in top_idx]
    latent_S = np.repeat(np.arange(len(sets)), [len(members) for members in sets])
    index_S = np.concatenate(sets) if sets else np.zeros(0, dtype=np.int64)
    if len(index_S) and index_S.min() < 0:
        raise ValueError(f"indices in top_idx ({index_S.min()}) must be >= 0")
    return latent_S, index_S
