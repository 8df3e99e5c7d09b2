"""The verdict: better only where both measures are, by more than chance and by more than a little."""

import numpy as np
import pytest

from trix.superposition.evaluation.probing import Hits
from trix.superposition.evaluation.verdict import MARGIN, Errors, judge

NUM_DOCUMENTS = 60


def errors(level: float, seed: int = 0) -> Errors:
    """About 1 - level of the variance explained; documents differ much, and are equally hard for all."""
    generator = np.random.default_rng(seed)
    variance = np.random.default_rng(9).uniform(1, 50, NUM_DOCUMENTS)
    return Errors(variance * np.clip(generator.normal(level, 0.02, NUM_DOCUMENTS), 0, None), variance)


def hits(share: float, seed: int = 0) -> Hits:
    """Two questions, three sizes of probes, 40 cases of each answer in a document, of which this share is right."""
    case = np.full((NUM_DOCUMENTS, 2, 2), 40.0)
    generator = np.random.default_rng(seed)
    return Hits(generator.binomial(40, share, (NUM_DOCUMENTS, 2, 3, 2)).astype(float), case)


@pytest.mark.parametrize(
    ("level", "share", "is_better"),
    [(0.1, 0.9, True), (0.1, 0.7, False), (0.3, 0.9, False), (0.3, 0.7, False), (0.5, 0.9, False), (0.1, 0.6, False)],
)
def test_both_measures_must_be_better_than_those_of_the_best_control(level: float, share: float, is_better: bool) -> None:
    controls = {"weak": (errors(0.5, 1), hits(0.7, 2)), "strong": (errors(0.3, 3), hits(0.6, 4))}
    verdict = judge((errors(level), hits(share)), controls)
    assert verdict.is_better is is_better
    assert verdict.explained_variance.control == "strong"
    assert verdict.probing.control == "weak"
    assert str(verdict).startswith("better than its best control: " if is_better else "no better than its control: ")


def test_a_control_is_no_better_than_itself() -> None:
    own = (errors(0.2), hits(0.8))
    verdict = judge(own, {"same": own})
    assert not verdict.is_better
    for part in (verdict.explained_variance, verdict.probing):
        assert (part.low, part.high) == (0.0, 0.0)
        assert part.ours == part.of_control


def test_the_interval_is_that_of_the_difference_over_documents() -> None:
    ours, control = errors(0.2, 5), errors(0.25, 6)
    found = judge((ours, hits(0.8)), {"control": (control, hits(0.7, 1))}).explained_variance
    generator = np.random.default_rng(1)
    draws = generator.integers(0, NUM_DOCUMENTS, (4000, NUM_DOCUMENTS))
    variance = ours.variance_P[draws].sum(axis=1)
    difference = (control.error_P[draws].sum(axis=1) - ours.error_P[draws].sum(axis=1)) / variance
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(difference, [0.025, 0.975])), abs=1e-3)
    assert found.low < found.ours - found.of_control < found.high
    assert found.ours == pytest.approx(1 - ours.error_P.sum() / ours.variance_P.sum())
    probing = judge((ours, hits(0.8)), {"control": (control, hits(0.7, 1))}).probing
    assert probing.low < probing.ours - probing.of_control < probing.high
    assert probing.high - probing.low < 0.04


def test_a_little_is_not_enough_however_sure() -> None:
    variance = np.ones(NUM_DOCUMENTS)
    ours, control = Errors(0.2 * variance, variance), Errors((0.2 + MARGIN / 2) * variance, variance)
    verdict = judge((ours, hits(0.9)), {"control": (control, hits(0.6, 1))})
    assert 0 < verdict.explained_variance.low < MARGIN
    assert verdict.probing.is_better
    assert not verdict.is_better


def test_what_cannot_be_judged_is_named() -> None:
    own = (errors(0.2), hits(0.8))
    with pytest.raises(ValueError, match=r"number of controls \(0\) must be >= 1"):
        judge(own, {})
    few = (Errors(np.ones(7), np.ones(7)), hits(0.8))
    with pytest.raises(ValueError, match=r"number of held-out documents \(7\) must be >= 8"):
        judge(few, {"control": few})
    with pytest.raises(ValueError, match="must be measured on the same documents"):
        judge(own, {"control": (Errors(np.ones(9), np.ones(9)), hits(0.8))})
