"""Scores against dictionaries whose agreement with the planted features is known."""

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from trix.superposition.evaluation.planted import TRAINING, PlantedActivations, PlantedConfig
from trix.superposition.evaluation.planted_scores import match_activations, match_directions, measure_absorption

PLANTED = PlantedActivations(PlantedConfig(width=64, num_features=48, mean_active=4.0, parents=4, children=3))
STRENGTH_NF = PLANTED.sample(3000, PLANTED.generator(TRAINING)).strength_NF
CHILDREN = (PLANTED.parent_F >= 0).nonzero().flatten()


def absorbed_dictionary() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and latents in which every child's latent writes its parent, too, and the parent's latent is then silent."""
    row_KD, z_NK = PLANTED.direction_FD.clone(), STRENGTH_NF.clone()
    for child in CHILDREN.tolist():
        parent = int(PLANTED.parent_F[child])
        row_KD[child] += PLANTED.direction_FD[parent]
        z_NK[STRENGTH_NF[:, child] > 0, parent] = 0.0
    return row_KD, z_NK


def test_a_perfect_dictionary_recovers_everything() -> None:
    order_K = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    directions = match_directions(PLANTED.direction_FD, 3.0 * PLANTED.direction_FD[order_K])
    assert bool(directions.is_recovered_F.all())
    torch.testing.assert_close(directions.best_F, torch.ones(48, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(directions.matched_F, directions.best_F)
    assert directions.num_rows_F.tolist() == [1] * 48
    activations = match_activations(STRENGTH_NF, 0.5 * STRENGTH_NF[:, order_K])
    torch.testing.assert_close(activations.correlation_F, torch.ones(48, dtype=torch.float64))
    assert activations.f1_F.tolist() == [1.0] * 48
    absorption = measure_absorption(directions.cosine_FK, PLANTED.parent_F, STRENGTH_NF, STRENGTH_NF[:, order_K])
    assert absorption == (0.0, 12)


def test_absorption_built_by_hand_is_found_and_half_of_it_is_half() -> None:
    row_KD, z_NK = absorbed_dictionary()
    cosine_FK = match_directions(PLANTED.direction_FD, row_KD).cosine_FK
    assert measure_absorption(cosine_FK, PLANTED.parent_F, STRENGTH_NF, z_NK) == (1.0, 12)
    # A parent's latent that fires is not absorbed, whatever the child's row holds.
    assert measure_absorption(cosine_FK, PLANTED.parent_F, STRENGTH_NF, STRENGTH_NF) == (0.0, 12)
    # Without the parent in the child's row, a silent parent is a miss and no absorption.
    clean_FK = match_directions(PLANTED.direction_FD, PLANTED.direction_FD).cosine_FK
    assert measure_absorption(clean_FK, PLANTED.parent_F, STRENGTH_NF, z_NK) == (0.0, 12)
    child = int(CHILDREN[0])
    token_n = (STRENGTH_NF[:, child] > 0).nonzero().flatten()
    half_NK = z_NK.clone()
    half_NK[token_n[::2], int(PLANTED.parent_F[child])] = 1.0
    of_child = len(token_n[1::2]) / len(token_n)
    rate = measure_absorption(cosine_FK, PLANTED.parent_F, STRENGTH_NF, half_NK).rate
    assert rate == pytest.approx((11 + of_child) / 12)


def test_a_random_dictionary_recovers_nothing_and_shows_no_absorption() -> None:
    generator = torch.Generator().manual_seed(5)
    directions = match_directions(PLANTED.direction_FD, torch.randn(48, 64, generator=generator))
    assert not directions.is_recovered_F.any()
    assert directions.best_F.mean() < 0.5
    z_NK = torch.rand(3000, 48, generator=generator) * (torch.rand(3000, 48, generator=generator) < 0.1)
    activations = match_activations(STRENGTH_NF, z_NK)
    assert activations.correlation_F.max() < 0.2
    absorption = measure_absorption(directions.cosine_FK, PLANTED.parent_F, STRENGTH_NF, z_NK)
    assert absorption.num_pairs == 0
    assert np.isnan(absorption.rate)


def test_a_split_feature_has_several_rows_and_is_matched_once() -> None:
    row_KD = torch.cat([PLANTED.direction_FD[:1].expand(3, -1), PLANTED.direction_FD[1:2]])
    directions = match_directions(PLANTED.direction_FD, row_KD)
    assert directions.num_rows_F.tolist() == [3, 1] + [0] * 46
    assert int((directions.matched_F > 0.9).sum()) == 2
    shared = match_directions(row_KD[:2], row_KD[:1])  # two features, one row
    assert shared.best_F.tolist() == pytest.approx([1.0, 1.0])
    assert sorted(shared.matched_F.tolist()) == pytest.approx([0.0, 1.0])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), num_features=st.integers(1, 4), num_latents=st.integers(1, 5))
def test_the_matching_is_the_best_of_all(seed: int, num_features: int, num_latents: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature_FD, row_KD = (torch.randn(num, 3, generator=generator) for num in (num_features, num_latents))
    found = match_directions(feature_FD, row_KD)
    cosine = found.cosine_FK.numpy()
    short = cosine if num_features <= num_latents else cosine.T
    sums = [sum(short[i, k] for i, k in enumerate(order)) for order in permutations(range(short.shape[1]), short.shape[0])]
    assert float(found.matched_F.sum()) == pytest.approx(max(sums))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), density=st.sampled_from([0.02, 0.3, 0.9]))
def test_agreement_of_activations_is_that_of_numpy_and_sklearn(seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    feature_NF, z_NK = (
        torch.rand(60, num, generator=generator) * (torch.rand(60, num, generator=generator) < density) for num in (3, 4)
    )
    z_NK[:, 1] = 0.0  # a dead latent
    found = match_activations(feature_NF, z_NK)
    for index in range(3):
        feature_N = feature_NF[:, index].double().numpy()
        if not feature_N.any():
            assert bool(found.correlation_F[index].isnan())
            assert bool(found.f1_F[index].isnan())
            continue
        latents = [z_N.double().numpy() for z_N in z_NK.T]
        correlations = [np.corrcoef(feature_N, z_N)[0, 1] if z_N.any() else 0.0 for z_N in latents]
        scores = [f1_score(feature_N > 0, z_N > 0, zero_division=0.0) for z_N in latents]
        assert float(found.correlation_F[index]) == pytest.approx(max(correlations), abs=1e-12)
        assert float(found.f1_F[index]) == pytest.approx(max(scores))


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"width of the decoder \(4\) must be that of the features \(3\)"):
        match_directions(torch.eye(3), torch.eye(4))
    with pytest.raises(ValueError, match=r"tokens of the latents \(4\) must be those of the features \(3\)"):
        match_activations(torch.eye(3), torch.eye(4))
