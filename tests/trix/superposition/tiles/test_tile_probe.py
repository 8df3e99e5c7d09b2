"""Predicting tiles from latents: planted features suffice, others are no better than the commonest tile."""

from dataclasses import replace

import numpy as np
import pytest
from planted_routing import NUM_FEATURES, NUM_TILES, planted_traffic

from trix.superposition.backends import Site
from trix.superposition.tiles import tile_probe

SITE = Site(0, "router_in")


def test_planted_features_predict_the_tile_of_held_out_documents_and_the_others_do_not() -> None:
    training, held_out = planted_traffic().split()
    scores = tile_probe(training, held_out, range(NUM_TILES), SITE)
    assert scores.latents > 0.95
    assert scores.raw > 0.9
    assert scores.random_latents < scores.majority + 0.05 < 0.25
    assert (scores.num_latents, scores.num_tokens) == (NUM_TILES, held_out.num_tokens)


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
