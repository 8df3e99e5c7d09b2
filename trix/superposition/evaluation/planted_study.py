"""An architecture on planted features, next to controls that learn from the same activations.

Shapes: N tokens, D width, F planted features, K latents.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from inspect import isclass
from math import nan
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from trix.superposition.config import Settings
from trix.superposition.evaluation.controls import Batch, new_sae, train_steps
from trix.superposition.evaluation.planted import (
    EVALUATION,
    RANDOM_ROWS,
    TRAINING,
    WEIGHTS,
    PlantedActivations,
    PlantedConfig,
    PlantedTokens,
    stream_seed,
)
from trix.superposition.evaluation.planted_scores import (
    RECOVERED,
    DirectionMatch,
    match_activations,
    match_directions,
    measure_absorption,
)
from trix.superposition.evaluation.reconstruction import ReconstructionMetric
from trix.superposition.sae import ARCHITECTURES, RESTRAINTS, SAE

TRAINED, RANDOM = "trained", "random_directions"
COOL_DOWN = 0.2  # of the steps, at the end, in which the learning rate falls to 0
MAX_NUMBERS = 2**28  # of the activations of a seed, which are held in memory: 1 GiB
DEAD_SHARE = 0.1  # of the training tokens; a latent that has not fired for so long counts as dead


class PlantedStudy(Settings):
    """What is trained, on what, and next to which controls.

    The defaults are a hard case of small size. 512 features overlap in 128 dimensions, eight fire at once on average, and the
    rarest fires in one token of 260: training sees it 600 times. The autoencoder has as many latents as there are features,
    and may use as many at once as fire on average.

    By direction the controls have little chance. A soft-frozen row keeps a cosine of 0.8 with its start, so it can reach a
    cosine of 0.9 with a feature only if it starts at 0.46 or more: five standard deviations of a random cosine in 128
    dimensions, as it would be in the wider streams of real models. By activation they are not held back like this: a latent
    may fire exactly when the feature does, whatever its row is. That is why both are measured and both decide.

    Args:
        data: the planted features. architecture: a name in the registry of :mod:`trix.superposition.sae`. k: latents.
            active: active latents per token, if the architecture fixes their number; by default data.mean_active, rounded.
            settings: further arguments of the architecture.
        lr: learning rate of Adam, constant, and falling to 0 in the last fifth of the steps. batch_size: tokens of a step.
        tokens: training tokens, each seen once; what does not fill a batch is left out. eval_tokens: fresh ones, on which
            scores are measured. seeds: repetitions with other features, tokens and start values. controls: restraints that
            the controls have.

    Raises:
        ValueError: no control, an unknown or repeated one, fewer tokens than a batch or more than memory should hold, and what
            the architecture says of its settings.
    """

    data: PlantedConfig = PlantedConfig()
    architecture: str = "batch_topk"
    k: int = Field(default=512, ge=1, le=2**20)
    active: int | None = Field(default=None, ge=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    lr: float = Field(default=1e-2, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=512, ge=1)
    tokens: int = Field(default=300 * 512, ge=1)
    eval_tokens: int = Field(default=8192, ge=1)
    seeds: int = Field(default=3, ge=1)
    controls: list[str] = Field(default_factory=lambda: list(RESTRAINTS))

    @property
    def num_steps(self) -> int:
        return self.tokens // self.batch_size

    def make_sae(self) -> SAE:
        """A new autoencoder with weights from torch's global random state."""
        kind = ARCHITECTURES.get(self.architecture)
        arguments = {"dead_window": max(1, round(DEAD_SHARE * self.tokens))}
        if isclass(kind) and issubclass(kind, SAE) and kind.fixes_active:
            arguments["active"] = self.active or max(1, round(self.data.mean_active))
        elif self.active is not None:
            raise ValueError(f"active ({self.active}) must not be given: {self.architecture} has no fixed number of them")
        return ARCHITECTURES.make(self.architecture, self.data.width, self.k, arguments=arguments | self.settings)

    @model_validator(mode="after")
    def _check_fit(self) -> Self:
        for name in self.controls:
            if name not in RESTRAINTS or self.controls.count(name) > 1:
                raise ValueError(f"control ({name!r:.40}) must be one of {', '.join(RESTRAINTS)}, named once")
        if not self.controls:
            raise ValueError(f"number of controls (0) must be >= 1, of {', '.join(RESTRAINTS)}")
        if self.tokens < self.batch_size:
            raise ValueError(f"tokens ({self.tokens}) must be >= batch_size ({self.batch_size})")
        width, num_features = self.data.width, self.data.num_features
        sizes = {
            "num_features": (num_features, width),
            "k": (self.k, max(width, num_features)),
            "tokens": (self.tokens, width),
            "eval_tokens": (self.eval_tokens, max(width, num_features, self.k)),
            "batch_size": (self.batch_size, max(num_features, self.k)),
        }
        for name, (number, size) in sizes.items():
            if number * size > MAX_NUMBERS:
                raise ValueError(f"{name} ({number}) must be <= {MAX_NUMBERS // size}: all are held in memory")
        new_sae(self.make_sae, 0)
        return self


@dataclass(frozen=True)
class PlantedScores:
    """What a dictionary has found; nan where it is not defined, as all that needs latents is for random directions.

    recovered: share of the features with a row whose cosine with them is above 0.9. recovered_by_frequency: the same, each
    feature weighted by how often it fires. mean_cosine: of each feature with its nearest row. matched, mean_matched_cosine: the
    same two when each row serves one feature at most.
    recovered_by_activation: share of the features, of those that fire in the evaluation, with a latent whose activation has a
    correlation above 0.9 with the feature's strength; recovered_by_activation_by_frequency: weighted. mean_correlation,
    mean_f1: of each feature with its best latent.
    absorption, absorption_pairs: see :func:`~trix.superposition.evaluation.planted_scores.measure_absorption`. split: share of
    the recovered features with several rows above 0.9. rows_per_feature: mean number of those.
    explained_variance: 1 - sum |x - x_hat|^2 / sum |x - mean|^2. active: latents above 0 per token. dead: share of the latents
    that never are.
    """

    recovered: float
    recovered_by_frequency: float
    mean_cosine: float
    matched: float
    mean_matched_cosine: float
    split: float
    rows_per_feature: float
    recovered_by_activation: float = nan
    recovered_by_activation_by_frequency: float = nan
    mean_correlation: float = nan
    mean_f1: float = nan
    absorption: float = nan
    absorption_pairs: float = nan
    explained_variance: float = nan
    active: float = nan
    dead: float = nan


def run_study(study: PlantedStudy, advance: Callable[[], None] = lambda: None) -> dict[str, list[PlantedScores]]:
    """Train and score every contestant with every seed: "trained", the controls, and "random_directions".

    All contestants of a seed start from the same random weights and read the same batches.

    Args:
        advance: called after each step of training, seeds * (1 + controls) * num_steps times.

    Raises:
        ValueError: a training whose loss is not finite, or evaluation tokens in which no feature fires.
    """
    scores: dict[str, list[PlantedScores]] = {name: [] for name in (TRAINED, *study.controls, RANDOM)}
    for seed in range(study.seeds):
        planted = PlantedActivations(study.data, seed)
        generator = planted.generator(TRAINING)
        batches = [planted.sample(study.batch_size, generator).x_ND for _ in range(study.num_steps)]
        tokens = planted.sample(study.eval_tokens, planted.generator(EVALUATION))
        if not bool(tokens.strength_NF.any()):
            raise ValueError(
                f"eval_tokens ({study.eval_tokens}) must be enough for a feature to fire: with seed {seed} none does"
            )
        for name in (TRAINED, *study.controls):
            sae = new_sae(study.make_sae, stream_seed(seed, WEIGHTS), None if name == TRAINED else name)
            scores[name].append(score_sae(_trained(sae, study, batches, advance), planted, tokens))
        random_KD = torch.randn(study.k, study.data.width, generator=planted.generator(RANDOM_ROWS))
        scores[RANDOM].append(PlantedScores(**_of_directions(match_directions(planted.direction_FD, random_KD), planted)))
    return scores


@torch.no_grad()
def score_sae(sae: SAE, planted: PlantedActivations, tokens: PlantedTokens) -> PlantedScores:
    """Compare an autoencoder in evaluation mode with the planted features, on these tokens."""
    x_ND, strength_NF = tokens
    x_hat_ND, z_NK = sae(x_ND)
    directions = match_directions(planted.direction_FD, sae.W_dec)
    activations = match_activations(strength_NF, z_NK)
    absorption = measure_absorption(directions.cosine_FK, planted.parent_F, strength_NF, z_NK)
    fires_F = activations.correlation_F.isfinite()
    is_recovered_F = (activations.correlation_F > RECOVERED)[fires_F]
    reconstruction = ReconstructionMetric(x_ND.shape[1], z_NK.shape[1])
    reconstruction.update(x_hat_ND, x_ND, z_NK)
    found = {name: float(value) for name, value in reconstruction.compute().items()}
    return PlantedScores(
        **_of_directions(directions, planted),
        recovered_by_activation=_mean(is_recovered_F),
        recovered_by_activation_by_frequency=_mean(is_recovered_F, planted.frequency_F[fires_F]),
        mean_correlation=_mean(activations.correlation_F[fires_F]),
        mean_f1=_mean(activations.f1_F[fires_F]),
        absorption=absorption.rate,
        absorption_pairs=absorption.num_pairs,
        explained_variance=found["explained_variance"],
        active=found["active"],
        dead=found["dead"],
    )


def _of_directions(match: DirectionMatch, planted: PlantedActivations) -> dict[str, float]:
    num_rows_f = match.num_rows_F[match.is_recovered_F]
    return {
        "recovered": _mean(match.is_recovered_F),
        "recovered_by_frequency": _mean(match.is_recovered_F, planted.frequency_F),
        "mean_cosine": _mean(match.best_F),
        "matched": _mean(match.matched_F > RECOVERED),
        "mean_matched_cosine": _mean(match.matched_F),
        "split": _mean(num_rows_f > 1),
        "rows_per_feature": _mean(num_rows_f),
    }


def _trained(sae: SAE, study: PlantedStudy, batches: Iterable[Tensor], advance: Callable[[], None]) -> SAE:
    optimizer = torch.optim.Adam([weight for weight in sae.parameters() if weight.requires_grad], lr=study.lr)
    num_cooling = max(1, round(COOL_DOWN * study.num_steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (study.num_steps - step) / num_cooling))

    def advanced(given: Iterable[Batch]) -> Iterator[Batch]:
        for batch in given:
            yield batch
            advance()

    return train_steps(sae, ((x_ND, x_ND) for x_ND in batches), study.num_steps, optimizer, schedule, track=advanced)


def _mean(value_F: Tensor, weight_F: Tensor | None = None) -> float:
    """The mean, weighted if weights are given; nan of nothing."""
    value_F = value_F.double()
    return float(value_F.mean() if weight_F is None else (weight_F * value_F).sum() / weight_F.sum())
