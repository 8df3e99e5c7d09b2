"""Which latents go with which tiles: planted features are found, shifted tiles are not, and identities of the information."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_routing import LENGTH, NUM_FEATURES, NUM_TILES, planted_traffic
from scipy import sparse
from scipy.stats import fisher_exact
from sklearn.metrics import mutual_info_score

from trix.superposition.tiles import Traffic, contingency, information, latent_information, permuted_within, tile_entropy


def traffic_of(latent_NK: np.ndarray, tile_N: np.ndarray, document_N: np.ndarray, token_N: np.ndarray | None = None) -> Traffic:
    num_tokens = len(tile_N)
    place_N = np.zeros(num_tokens, dtype=np.int64)
    token_N = np.zeros(num_tokens, dtype=np.int64) if token_N is None else token_N
    return Traffic(
        torch.zeros(num_tokens, 2), sparse.csr_matrix(latent_NK), tile_N, token_N, document_N, place_N, int(tile_N.max()) + 1
    )


def test_planted_features_that_decide_the_routing_are_found_and_no_others() -> None:
    found = contingency(planted_traffic())
    is_planted = np.zeros((NUM_FEATURES, NUM_TILES), dtype=bool)
    is_planted[np.arange(NUM_TILES), np.arange(NUM_TILES)] = True
    assert found.is_discovery_KE[is_planted].mean() >= 0.95
    assert found.is_discovery_KE[~is_planted].mean() <= 0.05
    assert [found.top_latents(tile, 1) for tile in range(NUM_TILES)] == [[tile] for tile in range(NUM_TILES)]


@pytest.mark.parametrize("length", [2, 5, LENGTH])
def test_after_a_circular_shift_at_most_one_test_in_twenty_is_a_discovery(length: int) -> None:
    traffic = planted_traffic(length=length)
    assert contingency(traffic).discovery_rate() > 0.02  # 8 of 192 are planted
    for seed in range(3):
        assert contingency(traffic.shifted(seed), seed).discovery_rate() <= 0.01


def test_documents_that_differ_in_tiles_and_latents_make_no_discovery() -> None:
    draw = np.random.default_rng(0)
    document_N = np.repeat(np.arange(100), 50)
    is_odd_N = document_N % 2 == 1
    tile_N = np.where(draw.random(5000) < 0.9, is_odd_N, ~is_odd_N).astype(np.int64)
    latent_NK = (draw.random((5000, 4)) < np.where(is_odd_N, 0.5, 0.05)[:, None]).astype(np.float32)
    traffic = traffic_of(latent_NK, tile_N, document_N)
    assert information(traffic).tile_K.min() > 0.05  # tokens alone would make one of each latent
    assert contingency(traffic).discovery_rate() == 0


def test_counts_are_those_of_a_loop_over_documents_and_p_is_scipys() -> None:
    draw = np.random.default_rng(1)
    document_N = np.sort(draw.integers(0, 30, size=400))
    latent_NK = np.where(draw.random((400, 3)) < 0.1, draw.random((400, 3)), 0).astype(np.float32)
    tile_N = draw.integers(0, 4, size=400)
    tile_N[latent_NK[:, 0] > 0] = 2
    traffic = traffic_of(latent_NK, tile_N, document_N)
    found = contingency(traffic)
    for latent in range(3):
        hits = np.zeros(4, dtype=np.int64)
        num_documents = 0
        for document in np.unique(document_N):
            rows = np.flatnonzero(document_N == document)
            z = latent_NK[rows, latent]
            if z.max() > 0:
                num_documents += 1
                hits[tile_N[rows[z.argmax()]]] += 1
        assert found.num_documents_K[latent] == num_documents == found.control_hits_KE[latent].sum()
        assert found.hits_KE[latent].tolist() == hits.tolist()
        for tile in range(4):
            a, b = hits[tile], found.control_hits_KE[latent, tile]
            p = fisher_exact([[a, num_documents - a], [b, num_documents - b]], alternative="greater").pvalue
            assert found.p_KE[latent, tile] == pytest.approx(p, rel=1e-9)
    assert found.is_discovery_KE[0, 2]
    share = ((latent_NK[:, 0] > 0) & (tile_N == 2)).mean()
    assert found.pmi_KE[0, 2] == pytest.approx(np.log2(share / ((latent_NK[:, 0] > 0).mean() * (tile_N == 2).mean())))


def test_a_latent_that_is_never_active_is_tested_against_nothing() -> None:
    latent_NK = np.zeros((6, 2), dtype=np.float32)
    latent_NK[0, 1] = 1
    found = contingency(traffic_of(latent_NK, np.array([0, 1, 0, 1, 0, 1]), np.zeros(6, dtype=np.int64)))
    assert not found.is_tested_KE[0].any()
    assert (found.q_KE[0] == 1).all()
    assert found.top_latents(0, 3) == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_information_is_that_of_sklearn_within_each_given_value(seed: int, num_tiles: int, num_values: int) -> None:
    draw = np.random.default_rng(seed)
    tile_N, given_N = draw.integers(0, num_tiles, size=60), draw.integers(0, num_values, size=60)
    latent_NK = (draw.random((60, 3)) < 0.4).astype(np.float32)
    latent_NK[:, 2] = 0
    found = latent_information(sparse.csr_matrix(latent_NK), tile_N, given_N)
    for latent in range(3):
        expected = sum(
            (given_N == value).mean() * mutual_info_score(latent_NK[given_N == value, latent] > 0, tile_N[given_N == value])
            for value in np.unique(given_N)
        )
        assert found[latent] == pytest.approx(expected / np.log(2), abs=1e-12)


def test_a_tile_that_the_token_decides_leaves_no_information_for_latents() -> None:
    draw = np.random.default_rng(0)
    token_N = draw.integers(0, 12, size=2000)
    tile_N, latent_NK = token_N % 4, np.eye(12, dtype=np.float32)[token_N]
    found = information(traffic_of(latent_NK, tile_N, np.repeat(np.arange(20), 100), token_N))
    assert found.tile_K.min() > 0.1
    assert found.given_token_K.max() == pytest.approx(0, abs=1e-12)
    assert tile_entropy(tile_N, token_N) == 0
    assert tile_entropy(tile_N) == pytest.approx(2, abs=0.01)


def test_a_feature_that_decides_beyond_the_token_stands_out_from_its_control() -> None:
    found = information(planted_traffic())
    assert found.given_token_K[:NUM_TILES].min() > 0.3
    assert found.given_control_K.max() < 0.06
    assert found.control_K.max() < 0.01


def test_permuted_tiles_keep_what_each_token_goes_to() -> None:
    traffic = planted_traffic()
    permuted_N = permuted_within(traffic.tile_N, traffic.token_N, seed=3)
    assert (permuted_N != traffic.tile_N).any()
    for token in np.unique(traffic.token_N):
        rows = traffic.token_N == token
        assert sorted(permuted_N[rows]) == sorted(traffic.tile_N[rows])


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_a_shift_keeps_the_tiles_of_each_document_in_their_circular_order(seed: int) -> None:
    draw = np.random.default_rng(seed)
    document_N = np.sort(draw.integers(0, 6, size=30))
    traffic = traffic_of(np.ones((30, 1), dtype=np.float32), np.arange(30), document_N)
    shifted_N = traffic.shifted(seed).tile_N
    for document in np.unique(document_N):
        rows = np.flatnonzero(document_N == document)
        steps = {int(step) for step in (shifted_N[rows] - traffic.tile_N[rows]) % len(rows)}
        assert len(steps) == 1
        assert len(rows) == 1 or steps != {0}


def test_parts_of_a_split_share_no_document() -> None:
    training, held_out = planted_traffic().split(0.25, seed=1)
    assert set(training.document_N) & set(held_out.document_N) == set()
    assert len(set(held_out.document_N)) == 20
    assert training.num_tokens + held_out.num_tokens == planted_traffic().num_tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_N": np.array([0, 2])}, r"tiles \(0 to 2\) must be >= 0 and < number of tiles \(2\)"),
        ({"tile_N": np.array([0])}, r"numbers of tokens \(2, 2, 1, 2, 2, 2\) must be equal, and >= 1"),
    ],
)
def test_traffic_that_does_not_fit_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(traffic_of(np.ones((2, 1)), np.array([0, 1]), np.zeros(2, dtype=np.int64)), **change)
    with pytest.raises(ValueError, match="tokens of a document must be next to each other"):
        traffic_of(np.ones((3, 1)), np.array([0, 1, 0]), np.array([0, 1, 0]))
