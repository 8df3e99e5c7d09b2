import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.routing import HierarchicalRouter, SignatureRouter


def flat_twin(router: HierarchicalRouter) -> SignatureRouter:
    """The flat router with the same signatures, freezing and bias."""
    flat = SignatureRouter(router.d_model, router.num_tiles, router.top_k, router.balance_rate, router.source)
    flat = flat.to(router.balance_bias.dtype)
    flat.load_state_dict({name: value for name, value in router.state_dict().items() if name != "members_CM"})
    return flat


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(1, 3), st.integers(0, 1000), st.booleans())
def test_the_choice_is_the_flat_routers_for_any_sizes(
    num_tiles: int, tiles_per_cluster: int, top_k: int, seed: int, is_clustered: bool
) -> None:
    torch.manual_seed(seed)
    top_k, tiles_per_cluster = min(top_k, num_tiles), min(tiles_per_cluster, num_tiles)
    router = HierarchicalRouter(24, num_tiles, top_k, tiles_per_cluster=tiles_per_cluster).double()
    if is_clustered:
        router.recluster()
    router.balance_bias.copy_(torch.randn(num_tiles) * 0.2)
    x = torch.randn(17, 24, dtype=torch.float64)
    decision, flat = router(x), flat_twin(router)(x)
    assert torch.equal(decision.tile_idx, flat.tile_idx)
    chosen = flat.score.gather(1, flat.tile_idx)
    torch.testing.assert_close(decision.weight, chosen.sigmoid())
    is_known = decision.score > -torch.inf
    assert is_known.sum(dim=1).eq(min(top_k + 1, num_tiles)).all()
    torch.testing.assert_close(decision.score[is_known], flat.score[is_known])


def test_no_tile_is_lost_where_cluster_sizes_do_not_divide() -> None:
    router = HierarchicalRouter(64, 50, tiles_per_cluster=8)
    router.recluster()
    signatures = router.signatures()
    # Each tile's own signature as the token: that tile agrees with it most.
    assert torch.equal(router(signatures * 3).tile_idx[:, 0], torch.arange(50))


def test_stale_clusters_stay_exact() -> None:
    torch.manual_seed(0)
    router = HierarchicalRouter(32, 40)
    router.recluster()
    with torch.no_grad():
        router.raw_signatures.copy_(torch.randn_like(router.raw_signatures))
    x = torch.randn(64, 32)
    assert torch.equal(router(x).tile_idx, flat_twin(router)(x).tile_idx)
    assert router.recall(x) == 1.0


def test_probes_report_their_recall() -> None:
    torch.manual_seed(0)
    exact = HierarchicalRouter(32, 64, tiles_per_cluster=8).double()
    exact.recluster()
    x = torch.randn(300, 32, dtype=torch.float64)
    recalls = []
    for num_probes in (1, 2, 4, 8):
        router = HierarchicalRouter(32, 64, tiles_per_cluster=8, num_probes=num_probes).double()
        router.load_state_dict(exact.state_dict())
        recalls.append(router.recall(x))
        by_hand = (router(x).tile_idx == exact(x).tile_idx).double().mean().item()
        assert recalls[-1] == pytest.approx(by_hand)
        assert router.scored_share(x) == pytest.approx(num_probes / 8)
    assert recalls == sorted(recalls)
    assert 0.1 < recalls[0] < 0.9
    assert recalls[-1] == 1.0


def test_clusters_survive_state_dict_and_copies() -> None:
    router, other = HierarchicalRouter(16, 30), HierarchicalRouter(16, 30)
    router.recluster()
    other.load_state_dict(router.state_dict())
    assert torch.equal(other.members_CM, router.members_CM)
    assert torch.equal(copy.deepcopy(router).members_CM, router.members_CM)


def test_gradient_reaches_the_signatures_of_chosen_tiles_as_in_a_dense_computation() -> None:
    router = HierarchicalRouter(16, 9).double()
    x = torch.randn(20, 16, dtype=torch.float64)
    decision = router(x)
    (grad,) = torch.autograd.grad(decision.weight.sum(), router.raw_signatures)
    score = flat_twin(router)
    dense = score(x).score.gather(1, decision.tile_idx).sigmoid().sum()
    (expected,) = torch.autograd.grad(dense, score.raw_signatures)
    torch.testing.assert_close(grad, expected)


def test_packed_routing_is_the_exact_one() -> None:
    router = HierarchicalRouter(20, 33, top_k=2)
    x = torch.randn(40, 20)
    before = router(x)
    router.pack_signatures()
    assert torch.equal(router(x).tile_idx, before.tile_idx)
    torch.testing.assert_close(router(x).weight, before.weight)


def test_errors_state_the_rule_and_both_values() -> None:
    with pytest.raises(ValueError, match=r"tiles_per_cluster \(9\) must be >= 1 and <= num_tiles \(8\)"):
        HierarchicalRouter(4, 8, tiles_per_cluster=9)
    with pytest.raises(ValueError, match=r"num_probes \(5\) must be >= 1 and <= the number of clusters \(4\)"):
        HierarchicalRouter(4, 8, tiles_per_cluster=2, num_probes=5)
    with pytest.raises(ValueError, match=r"num_probes \(1\) clusters of 2 tiles must hold top_k \(3\) tiles"):
        HierarchicalRouter(4, 8, top_k=3, tiles_per_cluster=2, num_probes=1)
    with pytest.raises(ValueError, match=r"last dimension of x \(5\) must equal d_model \(4\)"):
        HierarchicalRouter(4, 8)(torch.randn(2, 5))
