"""Whether an autoencoder is better than its best control, by intervals over held-out documents that are drawn anew.

Shapes: P documents, R draws.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap

from trix.superposition.evaluation.probing import Hits

Floats = NDArray[np.float64]

NUM_DRAWS, LEVEL = 1000, 0.95
MARGIN = 0.001  # of explained variance and of balanced accuracy: what rounding on another machine can make of the same training
MIN_DOCUMENTS = 8
MAX_VALUES = 10_000_000  # held at once while documents are drawn


@dataclass(frozen=True)
class Difference:
    """A measure of an autoencoder and of the control that does best by it. low, high: interval of ours - control."""

    ours: float
    control: str
    of_control: float
    low: float
    high: float

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies above MARGIN."""
        return self.low > MARGIN

    def __str__(self) -> str:
        interval = f"{LEVEL:.0%} interval of the difference {self.low:+.3f} to {self.high:+.3f}"
        return f"{self.ours:.3f} against {self.of_control:.3f} of {self.control} ({interval})"


@dataclass(frozen=True)
class Verdict:
    """An autoencoder is better than its best control if it is so in explained variance and in sparse probing, each against the
    control that is best there: the 95 % interval of the difference lies above MARGIN."""

    explained_variance: Difference
    probing: Difference

    @property
    def is_better(self) -> bool:
        return self.explained_variance.is_better and self.probing.is_better

    def __str__(self) -> str:
        parts = (("explained variance", self.explained_variance), ("sparse probing", self.probing))
        figures = "; ".join(f"{name} {difference}" for name, difference in parts)
        return f"{'better than its best control' if self.is_better else 'no better than its control'}: {figures}"


@dataclass(frozen=True)
class Errors:
    """Sums over the tokens of each document: error_P of |x - x_hat|^2, variance_P of |x - mean|^2, mean over all tokens."""

    error_P: Floats
    variance_P: Floats

    @property
    def explained_variance(self) -> float:
        return float(1 - self.error_P.sum() / self.variance_P.sum())


def judge(ours: tuple[Errors, Hits], controls: Mapping[str, tuple[Errors, Hits]], seed: int = 0) -> Verdict:
    """Compare an autoencoder with the best of its controls.

    Each interval is that of a paired bootstrap: documents are drawn anew, and both sides are measured on the same ones
    (percentile method). Sparse probing: balanced accuracy, mean over questions and numbers of latents.

    Raises:
        ValueError: no controls, fewer than MIN_DOCUMENTS documents, or other documents.
    """
    if not controls:
        raise ValueError(f"number of controls ({len(controls)}) must be >= 1")
    errors, hits = ours
    for of_ours, of_controls in (
        (errors.error_P, [of[0].error_P for of in controls.values()]),
        (hits.hit_PQS2, [of[1].hit_PQS2 for of in controls.values()]),
    ):
        if len(of_ours) < MIN_DOCUMENTS:
            raise ValueError(f"number of held-out documents ({len(of_ours)}) must be >= {MIN_DOCUMENTS} for an interval")
        if any(of_control.shape != of_ours.shape for of_control in of_controls):
            raise ValueError("an autoencoder and its controls must be measured on the same documents")
    best = max(controls, key=lambda name: controls[name][0].explained_variance)
    explained = _explained_difference(errors, best, controls[best][0], seed)
    best = max(controls, key=lambda name: float(controls[name][1].accuracy().mean()))
    return Verdict(explained, _probing_difference(hits, best, controls[best][1], seed))


def _explained_difference(ours: Errors, name: str, control: Errors, seed: int) -> Difference:
    def statistic(error_RP: Floats, control_RP: Floats, variance_RP: Floats, axis: int) -> Floats:
        return np.asarray((control_RP.sum(axis) - error_RP.sum(axis)) / variance_RP.sum(axis))

    low, high = _interval((ours.error_P, control.error_P, ours.variance_P), statistic, seed, len(ours.error_P))
    return Difference(ours.explained_variance, name, control.explained_variance, low, high)


def _probing_difference(ours: Hits, name: str, control: Hits, seed: int) -> Difference:
    num_documents = len(ours.hit_PQS2)

    def statistic(drawn_RP: NDArray[np.int64], axis: int) -> Floats:
        flat_RP = np.moveaxis(drawn_RP, axis, -1).reshape(-1, drawn_RP.shape[axis])
        weight_RP = np.stack([np.bincount(drawn_P, minlength=num_documents) for drawn_P in flat_RP]).astype(np.float64)
        differences = np.nanmean(ours.accuracy(weight_RP) - control.accuracy(weight_RP), axis=(1, 2))
        return np.asarray(differences.reshape(np.moveaxis(drawn_RP, axis, -1).shape[:-1]))

    low, high = _interval((np.arange(num_documents),), statistic, seed, num_documents)
    return Difference(float(ours.accuracy().mean()), name, float(control.accuracy().mean()), low, high)


def _interval(data: tuple[NDArray[np.generic], ...], statistic: object, seed: int, num_documents: int) -> tuple[float, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # a control against itself: the difference is 0 in every draw
        found = bootstrap(
            data,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=NUM_DRAWS,
            batch=max(MAX_VALUES // num_documents, 1),
            confidence_level=LEVEL,
            method="percentile",
            random_state=seed,
        ).confidence_interval
    return float(found.low), float(found.high)
