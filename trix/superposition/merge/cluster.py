"""Clusters of latents whose decoder rows point the same way.

Legend: D width, K latents, G components of a graph.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]

MAX_DENSE_LATENTS = 8192  # a dense matrix of more takes over 256 MB, and clustering by it six times that
NUM_NEIGHBOURS = 8
MIN_CLUSTERS = 16


class NeighbourDistance(NamedTuple):
    """Distances of latents that are too many for a matrix: unit_KD, float32, whose rows have norm 1, and graph_KK, csr, a
    connected graph of each latent's nearest neighbours."""

    unit_KD: FloatArray
    graph_KK: sparse.csr_matrix


def cosine_dist_from_decoder(W: npt.ArrayLike | Tensor) -> FloatArray | NeighbourDistance:
    """1 - cos of the decoder's directions: float32 [K, K], symmetric, in [0, 2], 0 on the diagonal.

    A column of zeros has distance 1 from all others. Above 8192 latents the result is a :class:`NeighbourDistance`, which
    :func:`agglomerative_labels` and :func:`~trix.superposition.merge.medoids_from_labels` take as well.

    Args:
        W: decoder [D, K], a column for each latent, as ``dec.weight``.

    Raises:
        ValueError: another shape, values that are not finite, or, above 8192 latents, a column of zeros.
    """
    W_DK = torch.as_tensor(W).detach().cpu().numpy()
    if W_DK.ndim != 2 or W_DK.shape[1] == 0 or not np.isfinite(W_DK).all():
        raise ValueError(f"W {W_DK.shape} must be [D, K] with K >= 1, and finite")
    norm_K = np.linalg.norm(W_DK.astype(np.float64), axis=0)
    unit_KD = np.ascontiguousarray((W_DK / np.where(norm_K > 0, norm_K, 1)).T, dtype=np.float32)
    if len(unit_KD) > MAX_DENSE_LATENTS:
        if not norm_K.all():
            raise ValueError(f"columns of W must not be zero above {MAX_DENSE_LATENTS} latents: column {np.argmin(norm_K)} is")
        return NeighbourDistance(unit_KD, _neighbour_graph(unit_KD))
    dist_KK = unit_KD @ unit_KD.T
    np.subtract(1, dist_KK, out=dist_KK)
    np.clip(dist_KK, 0, 2, out=dist_KK)
    np.fill_diagonal(dist_KK, 0)
    return dist_KK


def agglomerative_labels(dist: npt.ArrayLike | NeighbourDistance, n_clusters: int) -> IntArray:
    """The cluster of each latent, int64 [K] in [0, n_clusters), by agglomerative clustering with average linkage.

    scikit-learn's. A :class:`NeighbourDistance` allows only merges along its graph, which needs memory in proportion to K.
    Clusters are numbered by their first latents: latent 0 is in cluster 0.

    Raises:
        ValueError: n_clusters < 1 or > K, or distances [K, K] that are not.
    """
    from sklearn.cluster import AgglomerativeClustering

    if isinstance(dist, NeighbourDistance):
        num_latents = len(dist.unit_KD)
        rows, metric, graph = dist.unit_KD, "cosine", dist.graph_KK
    else:
        rows, metric, graph = np.asarray(dist), "precomputed", None
        num_latents = len(rows)
        if rows.shape != (num_latents, num_latents):
            raise ValueError(f"dist {rows.shape} must be [K, K]")
    if not 1 <= n_clusters <= num_latents:
        raise ValueError(f"n_clusters ({n_clusters}) must be >= 1 and <= the number of latents ({num_latents})")
    if num_latents == 1:  # scikit-learn asks for two
        return np.zeros(1, dtype=np.int64)
    clustering = AgglomerativeClustering(n_clusters, metric=metric, linkage="average", connectivity=graph)
    return _numbered_by_first(clustering.fit_predict(rows))


def auto_n_clusters(K: int, target_compression: float = 0.125) -> int:
    """max(16, K target_compression), rounded; K itself where there are fewer than 16 latents.

    Raises:
        ValueError: K < 1, or a compression that is not > 0 and <= 1.
    """
    if K < 1:
        raise ValueError(f"K ({K}) must be >= 1")
    if not 0 < target_compression <= 1:
        raise ValueError(f"target_compression ({target_compression}) must be > 0 and <= 1")
    return min(K, max(MIN_CLUSTERS, round(K * target_compression)))


def _numbered_by_first(labels: npt.NDArray[np.integer]) -> IntArray:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[inverse]


def _neighbour_graph(unit_KD: FloatArray) -> sparse.csr_matrix:
    """Symmetric graph of each latent's nearest neighbours, with the edges that make it connected.

    Duplicates can be nearer to each other than to all others, and form components of their own. Each component is linked to
    the one whose mean direction is nearest, which at least halves their number, until one is left.
    """
    graph_KK = _nearest(unit_KD, NUM_NEIGHBOURS)
    while True:
        num_components, component_K = sparse.csgraph.connected_components(graph_KK, directed=False)
        if num_components == 1:
            return graph_KK
        member = sparse.csr_matrix((np.ones(len(unit_KD), np.float32), (component_K, np.arange(len(unit_KD)))))
        mean_GD = member @ unit_KD
        mean_GD /= np.maximum(np.linalg.norm(mean_GD, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        # The member that is nearest to the mean direction stands for its component.
        order = np.lexsort((-np.einsum("kd,kd->k", unit_KD, mean_GD[component_K]), component_K))
        centre_G = order[np.searchsorted(component_K[order], np.arange(num_components))]
        from_G, to_G = _nearest(mean_GD, 1).nonzero()
        links = sparse.coo_matrix((np.ones(len(from_G)), (centre_G[from_G], centre_G[to_G])), shape=graph_KK.shape).tocsr()
        graph_KK = graph_KK.maximum(links)


def _nearest(unit_KD: FloatArray, num_neighbours: int) -> sparse.csr_matrix:
    from sklearn.neighbors import kneighbors_graph

    num_neighbours = min(num_neighbours, len(unit_KD) - 1)
    graph_KK = kneighbors_graph(unit_KD, num_neighbours, metric="cosine", mode="connectivity", include_self=False)
    return graph_KK.maximum(graph_KK.T).tocsr()
