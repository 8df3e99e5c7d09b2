"""Does an exported model compute and route as the torch model does? numpy only, so that a deployment can ask too."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCORE_ROUNDING = 1e-5  # scores are of order 1 (standard deviations); a smaller gap may close by float32 rounding


@dataclass(frozen=True)
class Parity:
    """What a comparison found.

    max_relative_difference: max |actual - expected| / max |expected| over all logits; infinite where one is not finite.
    routing_agreement: share of (token, layer) pairs sent to the same tiles; 1 without routed layers.
    num_near_ties: pairs whose last chosen and first unchosen tile score within SCORE_ROUNDING of each other.
    num_unexplained: pairs routed differently although no near tie stands there or in the same sequence at an earlier layer.
    compared_with: whose answers were expected.
    """

    num_tokens: int
    max_relative_difference: float
    routing_agreement: float = 1.0
    num_near_ties: int = 0
    num_unexplained: int = 0
    compared_with: str = "torch"

    def agrees(self, limit: float) -> bool:
        """The difference is below the limit, and every token routed otherwise is explained."""
        return self.max_relative_difference < limit and not self.num_unexplained

    def __str__(self) -> str:
        return (
            f"with {self.compared_with} on {self.num_tokens} held-out tokens: "
            f"max relative difference {self.max_relative_difference:.1e}, "
            f"routed the same {self.routing_agreement:.2%}, near ties {self.num_near_ties}"
        )


@dataclass(frozen=True)
class OutputParity:
    """What a comparison of the outputs of somebody's own module found.

    num_values: the numbers in them. max_relative_difference: the largest of any output, each by its own largest value, of
    floats; infinite where one is not finite that should be. num_unequal: whole numbers and truth values that differ.
    compared_with: whose outputs were expected.
    """

    num_values: int
    max_relative_difference: float
    num_unequal: int = 0
    compared_with: str = "torch"

    def agrees(self, limit: float) -> bool:
        """The difference is below the limit, and whole numbers are equal."""
        return self.max_relative_difference < limit and not self.num_unequal

    def __str__(self) -> str:
        return (
            f"with {self.compared_with} on {self.num_values} output values: "
            f"max relative difference {self.max_relative_difference:.1e}, whole numbers that differ {self.num_unequal}"
        )


@dataclass(frozen=True)
class Drift:
    """How far answers are from those expected where they need not be the same, as with activations of 8 bits.

    relative_rms_difference: sqrt(mean (actual - expected)^2 / mean expected^2) over all logits. top_agreement: share of
    positions whose largest logit is the same. routing_agreement: share of (token, layer) pairs sent to the same tiles.
    """

    relative_rms_difference: float
    top_agreement: float
    routing_agreement: float = 1.0

    def __str__(self) -> str:
        return (
            f"against torch: relative RMS difference of the logits {self.relative_rms_difference:.1e}, "
            f"the same most likely answer {self.top_agreement:.2%}, routed the same {self.routing_agreement:.2%}"
        )


@dataclass(frozen=True)
class OutputDrift:
    """The same of the outputs of somebody's own module: over all their floats."""

    relative_rms_difference: float

    def __str__(self) -> str:
        return f"against torch: relative RMS difference of the outputs {self.relative_rms_difference:.1e}"


def drift(
    actual_logits: NDArray[np.floating],
    actual_idx: NDArray[np.int64] | None,
    expected_logits: NDArray[np.floating],
    expected_idx: NDArray[np.int64] | None,
) -> Drift:
    """Compare logits [..., V] and tile indices [B, T, L, K], None without routed layers."""
    actual, expected = actual_logits.astype(np.float64), expected_logits.astype(np.float64)
    mean_square = float(np.square(expected).mean())
    is_same = np.ones(1) if actual_idx is None or expected_idx is None else _is_same(actual_idx, expected_idx)
    return Drift(
        relative_rms_difference=float(
            np.sqrt(np.square(actual - expected).mean() / max(mean_square, np.finfo(np.float64).tiny))
        ),
        top_agreement=float((actual.argmax(axis=-1) == expected.argmax(axis=-1)).mean()),
        routing_agreement=float(is_same.mean()),
    )


def _is_same(actual_idx: NDArray[np.int64], expected_idx: NDArray[np.int64]) -> NDArray[np.bool_]:
    """bool [B, T, L]: the same tiles, in any order."""
    return np.asarray((np.sort(actual_idx, axis=-1) == np.sort(expected_idx, axis=-1)).all(axis=-1))


def relative_difference(actual: NDArray[np.floating], expected: NDArray[np.floating]) -> float:
    """max |actual - expected| / max |expected|; infinite where a value is not finite.

    Raises:
        ValueError: the shapes differ.
    """
    if actual.shape != expected.shape:
        raise ValueError(f"actual {actual.shape} and expected {expected.shape} must have the same shape")
    difference = float(np.abs(actual - expected).max() / max(float(np.abs(expected).max()), np.finfo(np.float32).tiny))
    return difference if np.isfinite(difference) else float("inf")


def compare(
    actual_logits: NDArray[np.floating],
    expected_logits: NDArray[np.floating],
    actual_idx: NDArray[np.int64] | None = None,
    expected_idx: NDArray[np.int64] | None = None,
    gap: NDArray[np.floating] | None = None,
) -> Parity:
    """Compare logits [B, T, V] (or [B, C]) and tile indices [B, T, L, K], gap [B, T, L] as in :func:`selection_gap`.

    Raises:
        ValueError: shapes that should be the same differ.
    """
    difference = relative_difference(actual_logits, expected_logits)
    if actual_idx is None or expected_idx is None or gap is None:
        return Parity(int(np.prod(actual_logits.shape[:-1])), difference)
    if actual_idx.shape != expected_idx.shape or gap.shape != actual_idx.shape[:-1]:
        raise ValueError(
            f"tile indices, actual {actual_idx.shape} and expected {expected_idx.shape}, must have the same shape, "
            f"and gap {gap.shape} theirs without the last axis"
        )
    is_same_BTL = _is_same(actual_idx, expected_idx)
    is_near_tie_BTL = gap <= SCORE_ROUNDING
    # A token that goes elsewhere at one layer changes what it and, by attention, its sequence meet at the next.
    is_excused_BTL = np.logical_or.accumulate(is_near_tie_BTL.any(axis=1, keepdims=True), axis=2)
    is_own_or_earlier = is_near_tie_BTL | np.concatenate(
        [np.zeros_like(is_excused_BTL[:, :, :1]), is_excused_BTL[:, :, :-1]], axis=2
    )
    return Parity(
        num_tokens=int(np.prod(is_same_BTL.shape[:2])),
        max_relative_difference=difference,
        routing_agreement=float(is_same_BTL.mean()),
        num_near_ties=int(is_near_tie_BTL.sum()),
        num_unexplained=int((~is_same_BTL & ~is_own_or_earlier).sum()),
    )


def compare_outputs(actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> OutputParity:
    """Compare outputs by name. Infinite values must be the same ones; whole numbers and truth values are counted where not.

    Raises:
        ValueError: names, shapes or types that should be the same differ.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"outputs ({', '.join(actual)}) must be those expected ({', '.join(expected)})")
    largest, num_values, num_other = 0.0, 0, 0
    for name, wanted in expected.items():
        found = actual[name]
        if found.shape != wanted.shape or found.dtype != wanted.dtype:
            sizes = f"{found.dtype} {found.shape}) must be as expected ({wanted.dtype} {wanted.shape}"
            raise ValueError(f"output {name} ({sizes})")
        num_values += wanted.size
        if np.issubdtype(wanted.dtype, np.floating):
            largest = max(largest, _relative_difference_with_infinities(found, wanted))
        else:
            num_other += int((found != wanted).sum())
    return OutputParity(num_values, largest, num_other)


def output_drift(actual: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> OutputDrift:
    """Compare outputs by name; values that are not finite where they are expected count for nothing."""
    errors, squares = [], []
    for name, wanted in expected.items():
        is_counted = np.isfinite(wanted) if np.issubdtype(wanted.dtype, np.floating) else np.zeros(wanted.shape, dtype=bool)
        squares.append(np.square(wanted[is_counted].astype(np.float64)))
        errors.append(np.square(actual[name][is_counted].astype(np.float64) - wanted[is_counted]))
    error, square = (float(np.concatenate(parts).sum()) for parts in (errors, squares))
    return OutputDrift(float(np.sqrt(error / max(square, np.finfo(np.float64).tiny))))


def _relative_difference_with_infinities(actual: NDArray[Any], expected: NDArray[Any]) -> float:
    is_infinite = np.isinf(expected)
    if not np.array_equal(actual[is_infinite], expected[is_infinite]):
        return float("inf")
    rest = ~is_infinite
    return relative_difference(actual[rest], expected[rest]) if rest.any() else 0.0


def selection_gap(score: NDArray[np.floating], top_k: int) -> NDArray[np.floating]:
    """Score of the last chosen tile minus that of the first unchosen one: [..., E] -> [...]; infinite where all are chosen."""
    if score.shape[-1] <= top_k:
        return np.full(score.shape[:-1], np.inf, dtype=score.dtype)
    ordered = np.sort(score, axis=-1)
    return np.asarray(ordered[..., -top_k] - ordered[..., -top_k - 1])
