import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.routing.clusters import balanced_kmeans, cluster_members


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 8), st.integers(0, 1000), st.booleans())
def test_every_row_is_in_one_cluster_and_sizes_differ_by_one_at_most(
    num_rows: int, num_clusters: int, width: int, seed: int, is_ternary: bool
) -> None:
    num_clusters = min(num_clusters, num_rows)
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(num_rows, width, generator=generator)
    value = value.sign() if is_ternary else value  # many rows are equal then
    size = torch.bincount(balanced_kmeans(value, num_clusters), minlength=num_clusters)
    assert set(size.tolist()) <= {num_rows // num_clusters, -(-num_rows // num_clusters)}
    members = cluster_members(value, num_clusters)
    assert members.shape == (num_clusters, -(-num_rows // num_clusters))
    assert sorted(members[members >= 0].tolist()) == list(range(num_rows))
    places = torch.where(members < 0, num_rows, members)
    assert torch.equal(places, places.sort(dim=1).values)  # ascending, empty places last


def test_planted_clusters_of_equal_size_are_found() -> None:
    torch.manual_seed(0)
    planted = torch.arange(96) % 8
    value = torch.randn(8, 16)[planted] * 3 + 0.1 * torch.randn(96, 16)
    found = balanced_kmeans(value, 8)
    for cluster in range(8):
        assert planted[found == cluster].unique().numel() == 1


def test_clusters_are_nearer_than_chance_and_deterministic() -> None:
    value = torch.randn(100, 12, generator=torch.Generator().manual_seed(0))
    found = balanced_kmeans(value, 9)
    assert torch.equal(found, balanced_kmeans(value, 9))

    def spread(cluster_idx: torch.Tensor) -> float:
        means = torch.stack([value[cluster_idx == cluster].mean(0) for cluster in range(9)])
        return (value - means[cluster_idx]).square().sum().item()

    assert spread(found) < 0.85 * spread(torch.arange(100) % 9)


@pytest.mark.parametrize("num_clusters", [0, 5])
def test_errors_state_the_rule_and_both_values(num_clusters: int) -> None:
    with pytest.raises(ValueError, match=rf"num_clusters \({num_clusters}\) must be >= 1 and <= the number of rows \(4\)"):
        balanced_kmeans(torch.randn(4, 3), num_clusters)
