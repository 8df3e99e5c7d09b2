"""Removing a latent's contribution: planted features decide tiles, and what is removed is what is said to be."""

import numpy as np
import pytest
import torch
from planted_routing import NUM_DOCUMENTS, NUM_FEATURES, NUM_TILES, WIDTH, planted_layer, planted_sae, planted_traffic
from planted_sae import ReLUSAE
from scipy import sparse
from small_dumps import trix_backend

from trix.nn import TriXBlock
from trix.superposition.backends import Site
from trix.superposition.tiles import Traffic, at_block, at_router, causal_check, decided_by, with_tiles_of


def test_the_top_latent_changes_five_times_the_tiles_that_random_active_latents_do() -> None:
    traffic, sae = planted_traffic(), planted_sae()
    found = causal_check(traffic, sae, range(NUM_TILES), at_router(traffic, planted_layer()))
    assert found.tokens_E.min() > 100
    assert found.changed > 0.8  # all tiles are as good without it, also the one that was chosen
    assert found.ratio >= 5


def test_a_latent_that_does_not_decide_changes_no_more_tiles_than_random_ones() -> None:
    traffic, sae = planted_traffic(), planted_sae()
    found = causal_check(traffic, sae, range(NUM_TILES, 2 * NUM_TILES), at_router(traffic, planted_layer()))
    assert found.tokens_E.min() > 30
    assert found.changed < 0.05
    # Of the five active latents one is the feature that decides, and removing so much of it does change the tile.
    assert 0.05 < found.random_changed < 0.4


def test_what_is_removed_is_the_contribution_and_the_control_has_its_norm() -> None:
    traffic, sae = planted_traffic(), planted_sae()
    latent, calls = 3, []

    def choose(rows: np.ndarray, removed_RD: torch.Tensor) -> np.ndarray:
        calls.append((rows, removed_RD))
        return np.zeros(len(rows), dtype=np.int64)

    causal_check(traffic, sae, [latent if tile == 3 else -1 for tile in range(NUM_TILES)], choose, num_draws=2)
    base, own, *controls = calls
    assert not base[1].any()
    z_R = torch.from_numpy(traffic.latent_NK[own[0], latent].toarray().ravel())
    assert (z_R > 0).all()
    assert (traffic.tile_N[own[0]] == 3).all()
    torch.testing.assert_close(own[1], z_R[:, None] * sae.W_dec[latent].detach())
    assert len(controls) == 2
    for rows, removed_RD in controls:
        torch.testing.assert_close(removed_RD.norm(dim=-1), own[1].norm(dim=-1))
        along_RF = removed_RD @ sae.W_dec.detach().T / removed_RD.norm(dim=-1, keepdim=True)
        other_R = along_RF.argmax(dim=-1).numpy()
        assert (other_R != latent).all()
        assert (traffic.latent_NK.toarray()[rows, other_R] > 0).all()


def test_a_tile_without_a_latent_or_without_tokens_counts_nothing() -> None:
    traffic, sae = planted_traffic(), planted_sae()
    found = causal_check(traffic, sae, [-1] * NUM_TILES, at_router(traffic, planted_layer()))
    assert found.tokens_E.sum() == 0
    assert np.isnan(found.changed)
    assert np.isnan(found.ratio)
    with pytest.raises(ValueError, match=r"latents \(1\) must be as many as tiles \(8\)"):
        causal_check(traffic, sae, [0], at_router(traffic, planted_layer()))
    with pytest.raises(ValueError, match="< 24"):
        causal_check(traffic, sae, [NUM_FEATURES] * NUM_TILES, at_router(traffic, planted_layer()))


def documents_of_a_model(**ffn: object) -> tuple[Traffic, TriXBlock]:
    """The stream that enters block 1 of a small model, and the block."""
    backend = trix_backend(**ffn)
    draw = np.random.default_rng(0)
    length_P = draw.integers(3, 20, size=12)
    token_N = draw.integers(0, 27, size=length_P.sum())
    document_N = np.repeat(np.arange(12), length_P)
    position_N = np.concatenate([np.arange(length) for length in length_P])
    zeros_N = np.zeros(len(token_N), dtype=np.int64)
    no_latents = sparse.csr_matrix((len(token_N), 32))
    traffic = Traffic(torch.zeros(len(token_N), 32), no_latents, zeros_N, token_N, document_N, position_N, 8)
    tokens, mask = traffic.padded(range(12), torch.from_numpy(token_N))
    x_ND = backend.forward_hidden(tokens, mask.long(), 1)[mask]
    sae = ReLUSAE(torch.eye(32), torch.eye(32))
    latents = sparse.csr_matrix(sae.encode(x_ND).detach().numpy())
    traffic = Traffic(x_ND, latents, zeros_N, token_N, document_N, position_N, 8)
    return with_tiles_of(traffic, backend, 1, 8), backend.block(1)  # type: ignore[return-value]


def test_at_a_block_the_tiles_are_those_of_the_model_and_of_the_changed_stream() -> None:
    traffic, block = documents_of_a_model()
    assert decided_by(block) == "hidden"
    rows = np.sort(np.random.default_rng(1).permutation(traffic.num_tokens)[:40])
    choose = at_block(traffic, block)
    assert choose(rows, torch.zeros(40, 32)).tolist() == traffic.tile_N[rows].tolist()
    # One token alone in its document: the whole stream is known.
    starts = traffic.starts_P
    removed = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    for start, stop in zip(starts, [*starts[1:], traffic.num_tokens], strict=True):
        x_TD = traffic.x_ND[start:stop].clone()
        x_TD[2] -= removed[0]
        with torch.no_grad():
            expected = block(x_TD[None], return_routing=True).routing["tile_idx"][0, 2, 0]
        assert choose(np.array([start + 2]), removed).tolist() == [expected]


def test_what_decides_is_read_from_the_block() -> None:
    found = {route_on: decided_by(documents_of_a_model(route_on=route_on)[1]) for route_on in ("embedding", "context")}
    assert found == {"embedding": "token", "context": "context"}
    assert decided_by(documents_of_a_model(routing="hash")[1]) == "token"
    traffic, block = documents_of_a_model(route_on="context")
    with pytest.raises(ValueError, match=r"routing of the block \(decided by the context\) must be decided by hidden states"):
        at_block(traffic, block)
    dense = trix_backend(kind="dense", num_tiles=16, route_on="embedding").block(0)
    with pytest.raises(ValueError, match="must have tiles"):
        decided_by(dense)  # type: ignore[arg-type]


def test_tiles_of_another_layer_are_those_that_a_dump_of_it_holds() -> None:
    traffic, _ = documents_of_a_model()
    backend = trix_backend()
    found = with_tiles_of(traffic, backend, 2, 8)
    for index in (0, 5):
        bounds = [*traffic.starts_P, traffic.num_tokens]
        rows = slice(bounds[index], bounds[index + 1])
        site = Site(2, "tile")
        expected = backend.activations(torch.from_numpy(traffic.token_N[rows])[None], None, [site])[site][0]
        assert found.tile_N[rows].tolist() == expected.tolist()
    is_kept = np.ones(traffic.num_tokens, dtype=bool)
    is_kept[0] = False
    with pytest.raises(ValueError, match="documents of the dump must be whole"):
        with_tiles_of(traffic.rows(is_kept), backend, 2, 8)
    with pytest.raises(ValueError, match="documents must be whole"):
        at_block(traffic.rows(is_kept), backend.block(1))  # type: ignore[arg-type]


def test_the_planted_traffic_is_what_the_layer_does() -> None:
    traffic = planted_traffic()
    rows = np.arange(100)
    assert at_router(traffic, planted_layer())(rows, torch.zeros(100, WIDTH)).tolist() == traffic.tile_N[:100].tolist()
    assert len(traffic.starts_P) == NUM_DOCUMENTS
