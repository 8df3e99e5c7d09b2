"""Merging tiles: planted duplicates merge without a trace, alike tiles better than random ones, the layer stays ordinary."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from planted_tiles import NUM_PARTS, WIDTH, Parts, plant_duplicates

from trix.evolution import tile_parameters
from trix.nn import TriXFFN
from trix.superposition.tiles import merge_into, merge_redundant_tiles, tile_distances

NUM_TILES = 2 * NUM_PARTS


def fresh_layer(num_tiles: int = NUM_TILES, **settings: object) -> TriXFFN:
    torch.manual_seed(0)
    made: dict[str, Any] = {"routing": "explicit", "balance_rate": 0.0} | settings
    return TriXFFN(WIDTH, num_tiles, **made).eval()


def tokens(num_tokens: int = 600) -> torch.Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trained() -> tuple[TriXFFN, Parts]:
    """A layer of 16 tiles that has learned a task of 8 parts."""
    layer, parts = fresh_layer(balance_rate=0.03), Parts(0)
    layer.train()
    optimizer = torch.optim.Adam(layer.parameters(), lr=5e-3)
    for _ in range(600):
        x, y = parts.batch()
        found, _, aux = layer(x, return_routing=True)
        optimizer.zero_grad()
        (F.mse_loss(found, y) + aux["total_aux"]).backward()
        optimizer.step()
    return layer.eval(), parts


@torch.no_grad()
def error(layer: TriXFFN, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(F.mse_loss(layer(batch[0]), batch[1]))


def test_tiles_duplicated_on_purpose_merge_and_the_layer_computes_what_it_did(trained: tuple[TriXFFN, Parts]) -> None:
    layer = copy.deepcopy(trained[0])
    with torch.no_grad():
        for parameter in tile_parameters(layer):
            parameter[NUM_PARTS:] = parameter[:NUM_PARTS].clone()
        layer.router.balance_bias[NUM_PARTS:] = layer.router.balance_bias[:NUM_PARTS]
    batch = trained[1].batch(1000)
    with torch.no_grad():
        before = layer(batch[0])
    found = merge_redundant_tiles(layer, batch[0], NUM_PARTS)
    assert found.cluster_E.tolist() == [*range(NUM_PARTS), *range(NUM_PARTS)]
    assert layer.free_slots().sum() == NUM_PARTS
    assert found.refitted == ()
    with torch.no_grad():
        torch.testing.assert_close(layer(batch[0]), before, rtol=1e-5, atol=1e-5)


def test_merging_by_distance_costs_less_than_merging_at_random_with_as_many_tiles(trained: tuple[TriXFFN, Parts]) -> None:
    layer, parts = trained
    shared, held_out = parts.batch(2000), parts.batch(2000)
    before = error(layer, held_out)
    for num_tiles in (8, 4):
        merged = copy.deepcopy(layer)
        merge_redundant_tiles(merged, shared[0], num_tiles)
        lost_at_random = []
        for seed in range(10):
            draw = np.random.default_rng(seed)
            order = draw.permutation(NUM_TILES)
            cluster_E = np.empty(NUM_TILES, dtype=np.int64)
            cluster_E[order] = [*range(num_tiles), *draw.integers(0, num_tiles, size=NUM_TILES - num_tiles)]
            at_random = copy.deepcopy(layer)
            merge_into(at_random, shared[0], cluster_E, order[:num_tiles])
            assert at_random.free_slots().sum() == merged.free_slots().sum() == NUM_TILES - num_tiles
            lost_at_random.append(error(at_random, held_out) - before)
        assert error(merged, held_out) - before < 0.6 * np.mean(lost_at_random)


def test_the_refit_helps_on_the_tokens_that_it_was_fitted_to(
    trained: tuple[TriXFFN, Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, parts = trained
    x, _ = parts.batch(2000)
    with torch.no_grad():
        wanted = layer(x)
    results = {}
    for is_refitted in (True, False):
        if not is_refitted:
            monkeypatch.setattr("trix.superposition.tiles.merging._refit", lambda *_: False)
        merged = copy.deepcopy(layer)
        found = merge_redundant_tiles(merged, x, 4)
        assert bool(found.refitted) == is_refitted
        with torch.no_grad():
            results[is_refitted] = float(F.mse_loss(merged(x), wanted))
    assert results[True] < 0.95 * results[False]


def test_a_merged_layer_is_an_ordinary_one(trained: tuple[TriXFFN, Parts]) -> None:
    layer, (x, _) = copy.deepcopy(trained[0]), trained[1].batch(500)
    merge_redundant_tiles(layer, x, 6)
    with torch.no_grad():
        expected = layer(x)
        again = fresh_layer()
        again.load_state_dict(layer.state_dict())
        assert torch.equal(again(x), expected)
        again.pack()
        torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    assert [entry["operation"] for entry in layer.get_surgery_history()] == ["merge"] * 10
    used = torch.unique(layer(x, return_routing=True)[1]["tile_idx"])
    assert not layer.free_slots()[used].any()


def test_the_distance_is_that_of_a_loop_over_pairs() -> None:
    layer, x = fresh_layer(4), tokens(50)
    layer.remove_tile(2)
    distance, in_use = tile_distances(layer, x)
    assert in_use.tolist() == [0, 1, 3]
    one = torch.ones(50, 1)
    with torch.no_grad():
        outputs = [layer.tiles(x, torch.full((50, 1), tile), one).flatten() for tile in range(4)]
    signature = layer.get_tile_signatures()
    for i, a in enumerate(in_use):
        for j, b in enumerate(in_use):
            cosines = F.cosine_similarity(signature[a], signature[b], dim=0) + F.cosine_similarity(
                outputs[a], outputs[b], dim=0
            )
            assert distance[i, j] == pytest.approx(2 - float(cosines), abs=1e-5)


def test_all_tiles_alike_leave_one(trained: tuple[TriXFFN, Parts]) -> None:
    layer = fresh_layer()
    plant_duplicates(layer, NUM_TILES - 1)
    with torch.no_grad():
        before = layer(tokens())
        merge_redundant_tiles(layer, tokens(), 1)
        torch.testing.assert_close(layer(tokens()), before, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_merged_is_refused_and_nothing_changes() -> None:
    layer, x = fresh_layer(4), tokens()
    with pytest.raises(ValueError, match=r"num_tiles \(5\) must be >= 1 and <= tiles in use \(4\)"):
        merge_redundant_tiles(layer, x, 5)
    with pytest.raises(ValueError, match=r"tokens \(0, 16\) must be \[T, D\] with T >= 1"):
        merge_redundant_tiles(layer, x[:0], 2)
    with pytest.raises(ValueError, match=r"l2 \(0\) must be > 0"):
        merge_redundant_tiles(layer, x, 2, l2=0)
    with pytest.raises(ValueError, match="tile 3, kept of cluster 0, must be a tile of it"):
        merge_into(layer, x, np.array([0, 0, 1, 1]), np.array([3, 2]))
    other = copy.deepcopy(layer)
    other.remove_tile(2)
    with pytest.raises(ValueError, match=r"cluster of tile 2 \(1\) must be -1: its slot is free"):
        merge_into(other, x, np.array([0, 0, 1, 1]), np.array([0, 3]))
    layer.freeze_signature(1)
    state = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"signature of tile 1 must not be frozen to be dropped"):
        merge_into(layer, x, np.array([0, 0, 0, 1]), np.array([0, 3]))
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items() if isinstance(value, torch.Tensor))
    with pytest.raises(ValueError, match=r"top_k \(2\) must be 1 to merge tiles"):
        merge_redundant_tiles(fresh_layer(4, top_k=2), x, 2)
