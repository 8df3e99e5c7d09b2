"""Predicting tiles from latents: planted features suffice, others are no better than the commonest tile."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planted_routing import NUM_FEATURES, NUM_TILES, planted_traffic

from trix.superposition.backends import Site
from trix.superposition.tiles import tile_probe
from trix.superposition.tiles.probe import as_often_active

SITE = Site(0, "router_in")


def test_planted_features_predict_the_tile_of_held_out_documents_and_the_others_do_not() -> None:
    training, held_out = planted_traffic().split()
    scores = tile_probe(training, held_out, range(NUM_TILES), SITE)
    assert scores.latents > 0.95
    assert scores.raw > 0.9
    assert max(scores.random_latents, scores.like_latents) < scores.majority + 0.05 < 0.25
    assert (scores.num_latents, scores.num_controls, scores.num_tokens) == (NUM_TILES, NUM_TILES, held_out.num_tokens)


def test_controls_are_fewer_where_there_are_no_more_latents_and_the_scores_say_so() -> None:
    training, held_out = planted_traffic().split()
    scores = tile_probe(training, held_out, range(NUM_FEATURES - 2), SITE)
    assert (scores.num_latents, scores.num_controls) == (NUM_FEATURES - 2, 2)
    assert scores.like_latents == scores.random_latents  # the same two
    without = tile_probe(training, held_out, range(NUM_FEATURES), SITE)
    assert without.num_controls == 0
    assert np.isnan([without.like_latents, without.random_latents]).all()


@given(st.integers(0, 10_000), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_no_other_latents_are_active_as_often(seed: int, num_chosen: int) -> None:
    draw = np.random.default_rng(seed)
    count_K = draw.integers(0, 50, size=7)
    chosen = draw.permutation(7)[:num_chosen].tolist()
    found = as_often_active(count_K, chosen)
    others = [latent for latent in np.flatnonzero(count_K).tolist() if latent not in chosen]
    assert len(set(found)) == len(found) == min(num_chosen, len(others))
    assert set(found) <= set(others)
    if len(others) < num_chosen:
        return
    log_K = np.log(np.maximum(count_K, 1))
    least = min(sum(abs(log_K[list(one)] - log_K[chosen])) for one in permutations(others, num_chosen))
    assert sum(abs(log_K[found] - log_K[chosen])) == pytest.approx(least)


def test_tiles_in_random_order_are_not_predicted() -> None:
    training, held_out = planted_traffic().split()
    training, held_out = (
        replace(part, tile_N=np.random.default_rng(0).permutation(part.tile_N)) for part in (training, held_out)
    )
    scores = tile_probe(training, held_out, range(NUM_TILES), SITE)
    assert max(scores.latents, scores.raw, scores.random_latents) < scores.majority + 0.05


@pytest.mark.parametrize(
    ("latents", "site", "message"),
    [
        ([0], Site(2, "resid_pre"), r"site \(resid_pre\.2\) must be router_in\.2"),
        ([], SITE, r"latents \(0\) must be different"),
        ([1, 1], SITE, r"latents \(2\) must be different"),
        ([NUM_FEATURES], SITE, r"must be different, >= 0 and < 24"),
    ],
)
def test_what_cannot_be_probed_is_refused(latents: list[int], site: Site, message: str) -> None:
    training, held_out = planted_traffic().split()
    with pytest.raises(ValueError, match=message):
        tile_probe(training, held_out, latents, site)
