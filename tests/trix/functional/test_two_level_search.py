import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.functional.signatures import inverse_sqrt_active
from trix.functional.tile_matmul import select_top_k
from trix.functional.two_level_search import two_level_search
from trix.routing.clusters import cluster_members


def signatures_in_families(num_tiles: int, width: int, num_families: int, seed: int) -> torch.Tensor:
    """Ternary signatures, tile e in family e mod num_families; those of a family differ in about 2 % of the positions."""
    generator = torch.Generator().manual_seed(seed)
    family_FD = torch.randint(-1, 2, (num_families, width), generator=generator)
    signature_ED = family_FD[torch.arange(num_tiles) % num_families]
    is_flipped_ED = torch.rand(num_tiles, width, generator=generator) < 0.015
    return torch.where(is_flipped_ED, torch.randint(-1, 2, (num_tiles, width), generator=generator), signature_ED).float()


def flat(x: torch.Tensor, signatures: torch.Tensor, bias: torch.Tensor, num_best: int) -> torch.Tensor:
    return select_top_k(x @ signatures.T * inverse_sqrt_active(signatures) + bias, num_best)


@settings(max_examples=60, deadline=None)
@given(
    num_tiles=st.integers(1, 40),
    width=st.integers(1, 24),
    num_families=st.integers(1, 12),
    cluster_seed=st.integers(1, 40),
    num_best=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_exact_search_is_the_flat_argmax_with_its_ties(
    num_tiles: int, width: int, num_families: int, cluster_seed: int, num_best: int, seed: int, data: st.DataObject
) -> None:
    # Whole numbers as inputs: products are exact, so that equal signatures really tie.
    num_clusters, num_best = min(cluster_seed, num_tiles), min(num_best, num_tiles)
    signatures = signatures_in_families(num_tiles, width, num_families, seed)
    x = torch.randint(-4, 5, (13, width), generator=torch.Generator().manual_seed(seed)).float()
    if data.draw(st.booleans(), label="is_aligned"):
        x = x + 8 * signatures[torch.arange(13) % num_tiles]
    bias = torch.randint(0, 2, (num_tiles,), generator=torch.Generator().manual_seed(seed)) * 0.25
    members = cluster_members(signatures, num_clusters)
    with pytest.MonkeyPatch.context() as patch:
        if data.draw(st.booleans(), label="goes_cluster_by_cluster"):
            patch.setattr("trix.functional.two_level_search.MAX_OPEN_SHARE", 1.0)
        found, _ = two_level_search(x, signatures, bias, members, num_best, 0)
    assert torch.equal(found, flat(x, signatures, bias, num_best))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tight_clusters_spare_most_scores_and_stay_exact(dtype: torch.dtype) -> None:
    signatures = signatures_in_families(256, 128, 16, seed=0).to(dtype)
    x = 3 * signatures[torch.arange(200) % 256] + torch.randint(-1, 2, (200, 128))
    members = cluster_members(signatures, 16)
    found, num_scored = two_level_search(x, signatures, torch.zeros(256, dtype=dtype), members, 2, 0)
    assert torch.equal(found, flat(x, signatures, torch.zeros(256, dtype=dtype), 2))
    assert int(num_scored) < 0.15 * 200 * 256


def test_clusters_that_mean_nothing_cost_time_but_not_correctness() -> None:
    signatures = signatures_in_families(64, 32, 64, seed=1).double()
    members = torch.arange(64).reshape(8, 8)
    x, bias = torch.randn(100, 32, dtype=torch.float64), torch.randn(64, dtype=torch.float64)
    found, num_scored = two_level_search(x, signatures, bias, members, 3, 0)
    assert torch.equal(found, flat(x, signatures, bias, 3))
    assert int(num_scored) <= (1 + 1 / 8) * 100 * 64  # the first cluster, and then all


def test_probes_visit_so_many_clusters_and_all_of_them_find_the_best() -> None:
    signatures = signatures_in_families(60, 32, 60, seed=2).double()
    members, bias = cluster_members(signatures, 6), torch.zeros(60, dtype=torch.float64)
    x = torch.randn(50, 32, dtype=torch.float64)
    recalls = []
    for num_probes in range(1, 7):
        found, num_scored = two_level_search(x, signatures, bias, members, 1, num_probes)
        assert int(num_scored) == 50 * 10 * num_probes
        recalls.append((found == flat(x, signatures, bias, 1)).double().mean().item())
    assert recalls == sorted(recalls)
    assert recalls[-1] == 1.0


def test_no_tokens_and_a_single_tile() -> None:
    signatures, members = torch.ones(1, 4), torch.zeros(1, 1, dtype=torch.int64)
    assert two_level_search(torch.randn(3, 4), signatures, torch.zeros(1), members, 1, 0)[0].tolist() == [[0], [0], [0]]
    assert two_level_search(torch.randn(0, 4), signatures, torch.zeros(1), members, 1, 0)[0].shape == (0, 1)


def test_the_operator_declares_what_it_returns() -> None:
    signatures = signatures_in_families(12, 8, 3, seed=3)
    arguments = (torch.randn(5, 8), signatures, torch.zeros(12), cluster_members(signatures, 4), 2, 0)
    torch.library.opcheck(torch.ops.trix.two_level_search.default, arguments)
