"""The latent that stands for each cluster, and the map from latents to clusters.

The map is the vector of labels itself: latent k belongs to cluster labels[k], which becomes latent labels[k] of the merged
autoencoder, which is also the column of the merge matrix.

Legend: D width, K latents, M clusters (merged latents).
"""

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from torch import Tensor

from trix.superposition.merge.cluster import IntArray, NeighbourDistance

Integers = npt.ArrayLike | Tensor


def medoids_from_labels(dist: npt.ArrayLike | NeighbourDistance, labels: Integers) -> IntArray:
    """The medoid of each cluster: the member with the least summed distance to the members, int64 [M] in the order of clusters.

    Ties go to the lowest latent. Distances between all members count, those of a :class:`NeighbourDistance` too.

    Raises:
        ValueError: labels that are not 0 to M - 1 without gaps, or another number of latents than `dist` has.
    """
    label_K = checked_labels(labels)
    num_clusters = int(label_K.max()) + 1
    member_KM = sparse.csr_matrix((np.ones(len(label_K)), (np.arange(len(label_K)), label_K)))
    num_latents = len(dist.unit_KD) if isinstance(dist, NeighbourDistance) else len(np.asarray(dist))
    if num_latents != len(label_K):
        raise ValueError(f"labels ({len(label_K)}) must be as many as the latents of dist ({num_latents})")
    if isinstance(dist, NeighbourDistance):
        # sum over members j of 1 - u_k u_j
        sum_MD = member_KM.T @ dist.unit_KD
        total_K = np.bincount(label_K)[label_K] - np.einsum("kd,kd->k", dist.unit_KD, sum_MD[label_K])
    else:
        total_K = (member_KM.T @ np.asarray(dist))[label_K, np.arange(num_latents)]
    # Rounding must not decide between latents that are equally good.
    order_K = np.lexsort((np.arange(num_latents), np.round(total_K, 6), label_K))
    medoid_M: IntArray = order_K[np.searchsorted(label_K[order_K], np.arange(num_clusters))]
    return medoid_M


def merge_matrix_from_labels(labels: Integers, medoids: Integers) -> npt.NDArray[np.float32]:
    """M[k, c] = 1 where latent k is in cluster c, else 0: float32 [K, M]; z M sums the latents of each cluster.

    Raises:
        ValueError: labels that are not 0 to M - 1 without gaps, or a medoid outside of its cluster.
    """
    label_K = checked_labels(labels)
    medoid_M = _integers(medoids, "medoids")
    num_clusters = int(label_K.max()) + 1
    if len(medoid_M) != num_clusters:
        raise ValueError(f"medoids ({len(medoid_M)}) must be as many as the clusters ({num_clusters})")
    for cluster, medoid in enumerate(medoid_M):
        if not 0 <= medoid < len(label_K) or label_K[medoid] != cluster:
            raise ValueError(f"medoid {cluster} (latent {medoid}) must be a latent of cluster {cluster}")
    matrix_KM = np.zeros((len(label_K), num_clusters), dtype=np.float32)
    matrix_KM[np.arange(len(label_K)), label_K] = 1
    return matrix_KM


def labels_from_merge_matrix(M: npt.ArrayLike | Tensor) -> IntArray:
    """The labels [K] of a merge matrix [K, M]; a vector of labels is returned as it is.

    Raises:
        ValueError: a row that is not one 1 among zeros, or a column without a latent.
    """
    given = torch.as_tensor(M).detach().cpu()
    matrix = (given.float() if given.is_floating_point() else given).numpy()  # numpy knows no bfloat16
    if matrix.ndim == 1:
        return checked_labels(matrix)
    if matrix.ndim != 2 or min(matrix.shape) == 0:
        raise ValueError(f"M {matrix.shape} must be [K, M], or labels [K]")
    is_wrong = (np.count_nonzero(matrix, axis=1) != 1) | (matrix.max(axis=1) != 1)
    if is_wrong.any():
        raise ValueError(f"row {np.argmax(is_wrong)} of M must hold one 1 among zeros: a latent belongs to one cluster")
    is_empty = ~matrix.any(axis=0)
    if is_empty.any():
        raise ValueError(f"column {np.argmax(is_empty)} of M must hold a latent: a cluster has at least one")
    return matrix.argmax(axis=1)


def cluster_stats(labels: Integers) -> dict[str, float]:
    """num_clusters; num_singletons: clusters of one latent; min_size, max_size, mean_size and median_size, in latents.

    Raises:
        ValueError: labels that are not 0 to M - 1 without gaps.
    """
    size_M = np.bincount(checked_labels(labels))
    return {
        "num_clusters": len(size_M),
        "num_singletons": int((size_M == 1).sum()),
        "min_size": int(size_M.min()),
        "max_size": int(size_M.max()),
        "mean_size": float(size_M.mean()),
        "median_size": float(np.median(size_M)),
    }


def checked_labels(labels: Integers) -> IntArray:
    """Labels as int64 [K].

    Raises:
        ValueError: no labels, or others than 0 to M - 1 without gaps.
    """
    label_K = _integers(labels, "labels")
    if len(label_K) == 0:
        raise ValueError("labels (0) must be at least 1")
    found = np.unique(label_K)
    if found[0] != 0 or found[-1] != len(found) - 1:
        raise ValueError(f"labels ({found[0]} to {found[-1]}, {len(found)} different) must be 0 to M - 1 without gaps")
    return label_K


def _integers(values: Integers, name: str) -> IntArray:
    array = np.asarray(values.cpu() if isinstance(values, Tensor) else values)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and len(array)):
        raise ValueError(f"{name} ({array.dtype} {array.shape}) must be a vector of integers")
    return array.astype(np.int64)
