import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from trix.superposition.merge import (
    NeighbourDistance,
    agglomerative_labels,
    auto_n_clusters,
    cluster,
    cosine_dist_from_decoder,
)


def planted_directions(
    num_groups: int, copies: int, noise: float, width: int = 24
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Columns [D, K] around num_groups directions, of lengths 0.5 to 2, shuffled, and the group of each."""
    rng = np.random.default_rng(0)
    group_K = rng.permutation(np.repeat(np.arange(num_groups), copies))
    columns = rng.normal(size=(width, num_groups))[:, group_K]
    columns = columns + noise * rng.normal(size=columns.shape)
    return (columns * rng.uniform(0.5, 2, size=columns.shape[1])).astype(np.float32), group_K


def same_partition(first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> bool:
    return bool(((first[:, None] == first) == (second[:, None] == second)).all())


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 6), num_latents=st.integers(1, 12))
def test_distances_are_those_of_scipy(seed: int, width: int, num_latents: int) -> None:
    W_DK = np.random.default_rng(seed).normal(size=(width, num_latents)).astype(np.float32)
    dist = cosine_dist_from_decoder(W_DK)
    np.testing.assert_allclose(dist, cdist(W_DK.T, W_DK.T, "cosine"), atol=1e-6)
    np.testing.assert_array_equal(dist, np.asarray(dist).T)
    assert (np.diag(dist) == 0).all()
    assert dist.min() >= 0
    assert dist.max() <= 2


def test_a_latent_without_direction_is_far_from_all() -> None:
    dist = cosine_dist_from_decoder(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_array_equal(dist, [[0, 1, 0], [1, 0, 1], [0, 1, 0]])


def test_planted_groups_are_found() -> None:
    W_DK, group_K = planted_directions(20, 5, noise=0.1)
    labels = agglomerative_labels(cosine_dist_from_decoder(W_DK), 20)
    assert same_partition(labels, group_K)
    _, first = np.unique(labels, return_index=True)
    assert (np.diff(first) > 0).all(), "clusters must be numbered by their first latents"


@pytest.mark.parametrize("copies", [2, 20])
def test_many_latents_are_clustered_along_a_graph(copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 copies each has its nearest neighbours among the others: the graph has to be connected."""
    monkeypatch.setattr(cluster, "MAX_DENSE_LATENTS", 30)
    W_DK, group_K = planted_directions(25, copies, noise=0.01)
    dist = cosine_dist_from_decoder(W_DK)
    assert isinstance(dist, NeighbourDistance)
    num_components = cluster.sparse.csgraph.connected_components(dist.graph_KK, directed=False)[0]
    assert num_components == 1
    assert dist.graph_KK.nnz < len(group_K) * 2 * (cluster.NUM_NEIGHBOURS + 1)
    assert same_partition(agglomerative_labels(dist, 25), group_K)


def test_a_graph_needs_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "MAX_DENSE_LATENTS", 2)
    with pytest.raises(ValueError, match="columns of W must not be zero above 2 latents: column 1 is"):
        cosine_dist_from_decoder(np.array([[1.0, 0.0, 1.0]]))


def test_every_number_of_clusters_is_had() -> None:
    dist = cosine_dist_from_decoder(np.random.default_rng(0).normal(size=(4, 9)))
    for n_clusters in range(1, 10):
        assert len(np.unique(agglomerative_labels(dist, n_clusters))) == n_clusters
    assert agglomerative_labels(np.zeros((1, 1)), 1).tolist() == [0]


@pytest.mark.parametrize(
    ("num_latents", "compression", "expected"), [(2048, 0.125, 256), (64, 0.125, 16), (9, 0.5, 9), (100, 1.0, 100)]
)
def test_the_number_of_clusters(num_latents: int, compression: float, expected: int) -> None:
    assert auto_n_clusters(num_latents, compression) == expected


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"W \(3,\) must be \[D, K\]"):
        cosine_dist_from_decoder(np.zeros(3))
    with pytest.raises(ValueError, match=r"W \(2, 2\) must be \[D, K\] with K >= 1, and finite"):
        cosine_dist_from_decoder(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match=r"n_clusters \(4\) must be >= 1 and <= the number of latents \(3\)"):
        agglomerative_labels(np.zeros((3, 3)), 4)
    with pytest.raises(ValueError, match=r"dist \(3, 2\) must be \[K, K\]"):
        agglomerative_labels(np.zeros((3, 2)), 1)
    with pytest.raises(ValueError, match=r"target_compression \(0\) must be > 0 and <= 1"):
        auto_n_clusters(20, 0)
    with pytest.raises(ValueError, match=r"K \(0\) must be >= 1"):
        auto_n_clusters(0)
