import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.superposition.merge import (
    NeighbourDistance,
    cluster,
    cluster_stats,
    cosine_dist_from_decoder,
    labels_from_merge_matrix,
    medoids_from_labels,
    merge_matrix_from_labels,
)


@st.composite
def clusterings(draw: st.DrawFn) -> list[int]:
    """Labels 0 to M - 1, each at least once, in any order."""
    num_clusters = draw(st.integers(1, 5))
    return draw(st.permutations([*range(num_clusters), *draw(st.lists(st.integers(0, num_clusters - 1), max_size=12))]))


@settings(deadline=None)
@given(clusterings(), st.booleans())
def test_medoid_c_is_the_best_member_of_cluster_c(labels: list[int], by_graph: bool) -> None:
    W_DK = np.random.default_rng(len(labels)).normal(size=(6, len(labels)))
    exact = np.asarray(cosine_dist_from_decoder(W_DK))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "MAX_DENSE_LATENTS", 1 if by_graph and len(labels) > 1 else 8192)
        dist = cosine_dist_from_decoder(W_DK)
    assert isinstance(dist, NeighbourDistance) == (by_graph and len(labels) > 1)
    medoids = medoids_from_labels(dist, labels)
    for number, medoid in enumerate(medoids):
        members = [latent for latent, label in enumerate(labels) if label == number]
        assert medoid in members
        sums = {latent: exact[latent, members].sum() for latent in members}
        assert sums[int(medoid)] <= min(sums.values()) + 1e-5


def test_ties_go_to_the_lowest_latent() -> None:
    assert medoids_from_labels(np.zeros((4, 4)), [1, 0, 0, 1]).tolist() == [1, 0]


@settings(deadline=None)
@given(clusterings())
def test_column_c_of_the_merge_matrix_is_cluster_c(labels: list[int]) -> None:
    """Also where medoids do not come in order: sorted, they would name other columns than the labels do."""
    last_members = [max(k for k, label in enumerate(labels) if label == c) for c in range(max(labels) + 1)]
    matrix = merge_matrix_from_labels(labels, last_members)
    latents = np.random.default_rng(0).normal(size=(3, len(labels)))
    for number in range(max(labels) + 1):
        members = [latent for latent, label in enumerate(labels) if label == number]
        np.testing.assert_allclose((latents @ matrix)[:, number], latents[:, members].sum(axis=1), atol=1e-6)
    assert labels_from_merge_matrix(matrix).tolist() == labels
    assert labels_from_merge_matrix(torch.from_numpy(matrix)).tolist() == labels
    assert labels_from_merge_matrix(labels).tolist() == labels


def test_statistics_of_clusters() -> None:
    assert cluster_stats([0, 1, 1, 2, 2, 2, 2]) == {
        "num_clusters": 3,
        "num_singletons": 1,
        "min_size": 1,
        "max_size": 4,
        "mean_size": pytest.approx(7 / 3),
        "median_size": 2.0,
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cluster_stats([]), "labels (0) must be at least 1"),
        (lambda: cluster_stats([0, 2]), "labels (0 to 2, 2 different) must be 0 to M - 1 without gaps"),
        (lambda: cluster_stats([-1, 0]), "labels (-1 to 0, 2 different) must be 0 to M - 1 without gaps"),
        (lambda: cluster_stats([0.0, 1.0]), "labels (float64 (2,)) must be a vector of integers"),
        (lambda: medoids_from_labels(np.zeros((3, 3)), [0, 0]), "labels (2) must be as many as the latents of dist (3)"),
        (lambda: merge_matrix_from_labels([0, 1], [0]), "medoids (1) must be as many as the clusters (2)"),
        (lambda: merge_matrix_from_labels([1, 0], [0, 1]), "medoid 0 (latent 0) must be a latent of cluster 0"),
        (lambda: labels_from_merge_matrix(np.ones((2, 2))), "row 0 of M must hold one 1 among zeros"),
        (lambda: labels_from_merge_matrix(np.eye(2) * 0.5), "row 0 of M must hold one 1 among zeros"),
        (lambda: labels_from_merge_matrix(np.eye(3)[:2]), "column 2 of M must hold a latent"),
        (lambda: labels_from_merge_matrix(np.zeros((0, 2))), "M (0, 2) must be [K, M], or labels [K]"),
    ],
)
def test_errors(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
