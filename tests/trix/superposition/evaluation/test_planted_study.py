"""Architectures and controls on planted features: what training must find, what controls cannot, that it repeats."""

import dataclasses

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from trix.superposition.evaluation.planted import EVALUATION, PlantedActivations, PlantedConfig
from trix.superposition.evaluation.planted_study import RANDOM, TRAINED, PlantedScores, PlantedStudy, run_study, score_sae
from trix.superposition.sae import RESTRAINTS

DATA = PlantedConfig(width=64, num_features=48, mean_active=3.0, parents=3, correlation=0.0)
SMALL = PlantedStudy(data=DATA, k=48, active=3, tokens=150 * 128, batch_size=128, eval_tokens=1000, seeds=2)


class Oracle(nn.Module):
    """Knows the strengths of the tokens that it is given, and writes the planted directions."""

    def __init__(self, planted: PlantedActivations, strength_NF: Tensor) -> None:
        super().__init__()
        self.W_dec, self.offset_D, self.strength_NF = planted.direction_FD, planted.offset_D, strength_NF

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        return self.strength_NF @ self.W_dec + self.offset_D, self.strength_NF


def repeated(scores: list[PlantedScores]) -> list[str]:
    """Compared as text, in which nan equals nan."""
    return [repr(score) for score in scores]


def test_the_true_dictionary_has_perfect_scores() -> None:
    planted = PlantedActivations(DATA.model_copy(update={"noise": 0.0}))
    tokens = planted.sample(2000, planted.generator(EVALUATION))
    score = score_sae(Oracle(planted, tokens.strength_NF), planted, tokens)  # type: ignore[arg-type]
    perfect = ("recovered", "recovered_by_frequency", "mean_cosine", "matched", "mean_matched_cosine", "rows_per_feature")
    perfect += ("recovered_by_activation", "recovered_by_activation_by_frequency", "mean_correlation", "mean_f1")
    for name in (*perfect, "explained_variance"):
        assert getattr(score, name) == pytest.approx(1.0), name
    assert (score.absorption, score.absorption_pairs, score.split, score.dead) == (0.0, 12, 0.0, 0.0)
    assert score.active == pytest.approx(float((tokens.strength_NF > 0).sum()) / 2000)


def test_training_finds_what_controls_do_not() -> None:
    steps: list[None] = []
    scores = run_study(SMALL, lambda: steps.append(None))
    assert list(scores) == [TRAINED, *RESTRAINTS, RANDOM]
    assert len(steps) == 2 * 4 * 150
    for seed in range(2):
        trained = scores[TRAINED][seed]
        controls = [scores[name][seed] for name in (*RESTRAINTS, RANDOM)]
        assert trained.recovered > 0.5 > 0.1 > max(control.recovered for control in controls)
        assert trained.explained_variance > max(scores[name][seed].explained_variance for name in RESTRAINTS)
        assert trained.recovered_by_frequency > trained.recovered  # the frequent ones are found first
    assert scores[TRAINED][0] != scores[TRAINED][1]


def test_a_second_run_is_equal() -> None:
    short = SMALL.model_copy(update={"tokens": 10 * 128})
    scores, again = run_study(short), run_study(short)
    for name, of_name in scores.items():
        assert repeated(again[name]) == repeated(of_name)


def test_contestants_start_from_the_same_weights() -> None:
    still = SMALL.model_copy(update={"tokens": 128, "lr": 1e-12, "seeds": 1})
    scores = run_study(still)
    cosines = {scores[name][0].mean_cosine for name in (TRAINED, *RESTRAINTS)}
    assert max(cosines) - min(cosines) < 1e-6
    assert abs(scores[RANDOM][0].mean_cosine - cosines.pop()) > 1e-6


def test_random_directions_have_no_latents_to_score() -> None:
    score = run_study(SMALL.model_copy(update={"tokens": 128, "seeds": 1, "controls": ["frozen_encoder"]}))[RANDOM][0]
    undefined = {field.name for field in dataclasses.fields(score) if getattr(score, field.name) != getattr(score, field.name)}
    assert undefined >= {"recovered_by_activation", "mean_f1", "absorption", "explained_variance", "active", "dead"}
    assert score.recovered == 0.0


def test_the_number_of_active_latents_follows_the_features() -> None:
    assert PlantedStudy(data=DATA, k=48).make_sae().settings()["active"] == 3
    assert PlantedStudy(k=48, active=5).make_sae().settings()["active"] == 5
    assert PlantedStudy(settings={"dead_window": 7}).make_sae().dead_window == 7
    assert PlantedStudy(architecture="standard", settings={"l1": 0.5}).make_sae().settings()["l1"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 8, "active": 9}, r"active \(9\) must be >= 1 and <= k \(8\)"),
        ({"k": 7}, r"active \(8\) must be >= 1 and <= k \(7\)"),
        ({"architecture": "standard", "active": 3}, r"active \(3\) must not be given: standard has no fixed number"),
        ({"architecture": "nothing"}, "SAE architecture \\('nothing'\\) must be 'standard'"),
        ({"settings": {"l2": 1}}, "unexpected keyword argument 'l2'"),
        ({"controls": []}, r"number of controls \(0\) must be >= 1"),
        ({"controls": ["frozen"]}, r"control \('frozen'\) must be one of frozen_decoder, soft_frozen_decoder, frozen_encoder"),
        ({"controls": ["frozen_decoder"] * 2}, "named once"),
        ({"tokens": 100}, r"tokens \(100\) must be >= batch_size \(512\)"),
        ({"tokens": 2**22}, r"tokens \(4194304\) must be <= 2097152"),
        ({"k": 2**20, "eval_tokens": 1}, r"k \(1048576\) must be <= 524288"),
        ({"eval_tokens": 2**20}, r"eval_tokens \(1048576\) must be <= 524288"),
    ],
)
def test_settings_that_no_study_has_are_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PlantedStudy.model_validate(settings)


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    run_study(SMALL.model_copy(update={"tokens": 128, "seeds": 1}))
    assert torch.equal(torch.rand(2), expected)
