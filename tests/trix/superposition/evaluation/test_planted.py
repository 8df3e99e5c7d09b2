"""Planted features: they fire as often, as strongly and together as the settings say."""

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import multivariate_normal, norm

from trix.superposition.evaluation.controls import new_sae
from trix.superposition.evaluation.planted import (
    EVALUATION,
    TRAINING,
    WEIGHTS,
    PlantedActivations,
    PlantedConfig,
    stream_seed,
)
from trix.superposition.sae import TopKSAE

SMALL = PlantedConfig(width=24, num_features=40, mean_active=4.0, parents=3, children=2, child_share=0.6)
TOKENS = 20_000


def is_near_share(count: torch.Tensor, share: torch.Tensor, num_tokens: int) -> bool:
    """Within five standard deviations of the binomial distribution."""
    return bool(((count / num_tokens - share).abs() <= 5 * (share * (1 - share) / num_tokens).sqrt()).all())


@pytest.mark.parametrize("correlation", [0.0, 0.5])
def test_features_fire_as_often_as_zipfs_law_says(correlation: float) -> None:
    planted = PlantedActivations(SMALL.model_copy(update={"correlation": correlation}))
    share = planted.frequency_F
    assert float(share.sum()) == pytest.approx(4.0)
    assert float(share[0] / share[19]) == pytest.approx(30 / 11)  # ranks 1 and 20, each moved by 10
    fires_NF = planted.sample(TOKENS, planted.generator(TRAINING)).strength_NF > 0
    assert is_near_share(fires_NF.sum(dim=0), share, TOKENS)


def test_a_child_fires_only_with_its_parent_and_never_with_a_sibling() -> None:
    planted = PlantedActivations(SMALL)
    fires_NF = planted.sample(TOKENS, planted.generator(TRAINING)).strength_NF > 0
    assert planted.parent_F.tolist() == [-1] * 34 + [0, 0, 1, 1, 2, 2]
    for parent in range(3):
        with_child_N = fires_NF[:, planted.parent_F == parent].sum(dim=1)
        assert with_child_N.max() == 1
        assert bool(fires_NF[with_child_N > 0, parent].all())
        num_parent = int(fires_NF[:, parent].sum())
        assert is_near_share(with_child_N.sum(), torch.tensor(0.6), num_parent)


def test_features_of_a_group_fire_together_as_their_gaussians_say() -> None:
    planted = PlantedActivations(PlantedConfig(width=4, num_features=16, mean_active=3.2, zipf=0.0, parents=0, correlation=0.5))
    fires_NF = planted.sample(TOKENS, planted.generator(TRAINING)).strength_NF > 0
    quantile = norm.ppf(0.2)
    both = torch.tensor(multivariate_normal.cdf([quantile, quantile], cov=[[1.0, 0.5], [0.5, 1.0]]))
    assert both > 1.5 * 0.04
    for first, second, share in ((0, 1, both), (3, 7, both), (8, 15, both), (7, 8, torch.tensor(0.04))):
        assert is_near_share((fires_NF[:, first] & fires_NF[:, second]).sum(), share, TOKENS)


def test_an_activation_is_the_sum_of_its_features_and_the_offset() -> None:
    planted = PlantedActivations(SMALL.model_copy(update={"noise": 0.0, "offset": 2.0}))
    x_ND, strength_NF = planted.sample(500, planted.generator(TRAINING))
    assert torch.allclose(planted.direction_FD.norm(dim=-1), torch.ones(40))
    assert float(planted.offset_D.norm()) == pytest.approx(2.0)
    torch.testing.assert_close(x_ND - planted.offset_D, strength_NF @ planted.direction_FD)
    log_M = strength_NF[strength_NF > 0].log()
    assert float(log_M.median()) == pytest.approx(0.0, abs=0.04)
    assert float(log_M.std()) == pytest.approx(0.3, abs=0.03)


def test_noise_has_the_norm_that_is_asked_for() -> None:
    planted = PlantedActivations(SMALL.model_copy(update={"noise": 0.5}))
    x_ND, strength_NF = planted.sample(2000, planted.generator(TRAINING))
    noise_ND = x_ND - planted.offset_D - strength_NF @ planted.direction_FD
    assert float(noise_ND.square().sum(dim=1).mean().sqrt()) == pytest.approx(0.5, rel=0.03)


def test_a_seed_decides_all_and_its_streams_differ() -> None:
    first, again, other = PlantedActivations(SMALL, 1), PlantedActivations(SMALL, 1), PlantedActivations(SMALL, 2)
    assert torch.equal(first.direction_FD, again.direction_FD)
    assert not torch.equal(first.direction_FD, other.direction_FD)
    generator = first.generator(TRAINING)
    head, tail = first.sample(50, generator).x_ND, first.sample(50, generator).x_ND
    assert torch.equal(head, again.sample(50, again.generator(TRAINING)).x_ND)
    assert not torch.equal(head, tail)
    assert not torch.equal(head, first.sample(50, first.generator(EVALUATION)).x_ND)


def test_an_autoencoder_does_not_start_at_the_planted_directions() -> None:
    planted = PlantedActivations(PlantedConfig(width=128, num_features=64))
    start = new_sae(lambda: TopKSAE(128, 64, active=4), stream_seed(0, WEIGHTS)).W_dec
    assert (start @ planted.direction_FD.T).max() < 0.6
    leaked = new_sae(lambda: TopKSAE(128, 64, active=4), stream_seed(0, 0)).W_dec  # the stream of the directions themselves
    assert (leaked @ planted.direction_FD.T).max() > 0.99


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"num_features": 10, "parents": 3, "children": 3},
            r"parents and their children \(12\) must be <= num_features \(10\)",
        ),
        ({"num_features": 8}, r"frequency of the first feature \(1.28\) must be <= 1: mean_active \(8\) is too large"),
        ({"num_featuers": 8}, "did you mean num_features"),
        ({"correlation": 1.0}, "correlation"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PlantedConfig(**settings)
