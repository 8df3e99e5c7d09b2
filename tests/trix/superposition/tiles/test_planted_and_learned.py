"""Planted routing by the latents of an autoencoder that was trained: they are found, and they decide."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from planted_routing import NUM_FEATURES, NUM_TILES, WIDTH, hadamard, planted_activations, planted_layer, planted_traffic
from scipy import sparse

from trix.superposition.backends import Site
from trix.superposition.config import SAEConfig
from trix.superposition.sae import TopKSAE, train_sae
from trix.superposition.tiles import (
    Traffic,
    at_router,
    causal_check,
    contingency,
    decoder_rows,
    signature_alignment,
    tile_probe,
)

SITE = Site(0, "router_in")


@pytest.fixture(scope="module")
def learned() -> tuple[TopKSAE, Traffic]:
    """An autoencoder trained on other documents, and what its latents are on those of the traffic."""
    torch.manual_seed(0)
    sae = TopKSAE(WIDTH, 2 * NUM_FEATURES, active=5, dead_window=5000)
    x = torch.cat([planted_activations(seed) for seed in range(1, 5)])
    config = SAEConfig(k=sae.k, active=5, lr=5e-3, epochs=30, batch_size=512, architecture="topk")
    train_sae(sae, lambda: x.split(2048), config)
    traffic = planted_traffic()
    with torch.no_grad():
        latents = sparse.csr_matrix(sae.encode(traffic.x_ND).numpy())
    return sae, replace(traffic, latent_NK=latents)


def test_the_latents_of_the_features_that_decide_are_enriched_on_their_tiles(learned: tuple[TopKSAE, Traffic]) -> None:
    sae, traffic = learned
    cosine_FK = hadamard()[:NUM_FEATURES] / WIDTH**0.5 @ torch.nn.functional.normalize(decoder_rows(sae), dim=-1).T
    best_F, latent_F = cosine_FK.max(dim=-1)
    assert best_F.min() > 0.9  # each feature has a latent
    found = contingency(traffic)
    is_found = found.is_discovery_KE[latent_F[:NUM_TILES].numpy(), np.arange(NUM_TILES)]
    assert is_found.mean() >= 0.95
    others = found.is_discovery_KE[latent_F[NUM_TILES:].numpy()]
    assert others.mean() <= 0.05
    assert contingency(traffic.shifted()).discovery_rate() <= 0.05


def test_the_top_latents_found_on_some_documents_decide_on_others(learned: tuple[TopKSAE, Traffic]) -> None:
    sae, traffic = learned
    training, held_out = traffic.split()
    found = contingency(training)
    top = [found.top_latents(tile, 1)[0] for tile in range(NUM_TILES)]
    causal = causal_check(held_out, sae, top, at_router(held_out, planted_layer()))
    assert causal.tokens_E.min() > 30
    assert causal.ratio >= 5
    probe = tile_probe(training, held_out, top, SITE)
    assert probe.latents > 0.9
    assert probe.random_latents < 0.5
    aligned = signature_alignment(planted_layer().get_tile_signatures(), decoder_rows(sae), SITE)
    assert aligned.num_aligned == NUM_TILES
    assert aligned.latent_E.tolist() == top
