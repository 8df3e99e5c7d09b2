from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trix.superposition.analysis import fisher, fisher_exact_many
from trix.superposition.analysis.fisher import Alternative

ALTERNATIVES: tuple[Alternative, ...] = ("greater", "two-sided")


@st.composite
def margins(draw: st.DrawFn, largest: int) -> tuple[int, int, int, int]:
    total = draw(st.integers(1, largest))
    drawn, marked = draw(st.integers(0, total)), draw(st.integers(0, total))
    return draw(st.integers(max(0, drawn + marked - total), min(drawn, marked))), drawn, marked, total


def scipy_p(hits: int, drawn: int, marked: int, total: int, alternative: Alternative) -> float:
    table = [[hits, drawn - hits], [marked - hits, total - drawn - marked + hits]]
    return float(stats.fisher_exact(table, alternative=alternative).pvalue)


def exact_p(hits: int, drawn: int, marked: int, total: int, alternative: Alternative) -> float:
    support = range(max(0, drawn + marked - total), min(drawn, marked) + 1)
    weight = {x: comb(marked, x) * comb(total - marked, drawn - x) for x in support}
    counted = [x for x in support if (x >= hits if alternative == "greater" else weight[x] <= weight[hits])]
    return float(Fraction(sum(weight[x] for x in counted), comb(total, drawn)))


@settings(deadline=None, max_examples=50)
@given(margins(largest=2000), st.sampled_from(ALTERNATIVES))
def test_p_values_are_those_of_scipy(case: tuple[int, int, int, int], alternative: Alternative) -> None:
    np.testing.assert_allclose(fisher_exact_many(*case, alternative), scipy_p(*case, alternative), rtol=1e-9, atol=1e-290)


@settings(deadline=None)
@given(margins(largest=80), st.sampled_from(ALTERNATIVES))
def test_p_values_are_exact(case: tuple[int, int, int, int], alternative: Alternative) -> None:
    np.testing.assert_allclose(fisher_exact_many(*case, alternative), exact_p(*case, alternative), rtol=1e-12)


@pytest.mark.parametrize("total", [10, 400])
def test_both_sides_of_a_symmetric_distribution_count(total: int) -> None:
    """Where half of the objects are marked, P(x) = P(drawn - x): each x has a tie."""
    drawn, marked = total // 4 + 1, total // 2
    for hits in range(drawn + 1):
        found = fisher_exact_many(hits, drawn, marked, total)
        np.testing.assert_allclose(found, exact_p(hits, drawn, marked, total, "two-sided"), rtol=1e-12)
        np.testing.assert_allclose(
            found, min(1, 2 * fisher_exact_many(max(hits, drawn - hits), drawn, marked, total, "greater"))
        )


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_digits_last_with_millions_of_objects(alternative: Alternative) -> None:
    case = (40, 200, 100_000, 2_000_000)
    np.testing.assert_allclose(fisher_exact_many(*case, alternative), exact_p(*case, alternative), rtol=1e-12)


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("entries", [1, 500, 1 << 20])
def test_many_tests_are_each_test_by_itself(alternative: Alternative, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "TABLE_ENTRIES", entries)
    rng = np.random.default_rng(0)
    drawn_K, marked_C = rng.integers(0, 90, 12), np.array([0, 5, 40, 95, 100])
    hits_KC = rng.hypergeometric(marked_C, 100 - marked_C, np.maximum(drawn_K, 1)[:, None])
    low_KC = np.maximum(0, drawn_K[:, None] + marked_C - 100)
    hits_KC = np.clip(hits_KC, low_KC, np.minimum(drawn_K[:, None], marked_C))
    found_KC = fisher_exact_many(hits_KC, drawn_K[:, None], marked_C, 100, alternative)
    cases = [[(hits_KC[k, c], drawn_K[k], marked_C[c], 100) for c in range(5)] for k in range(12)]
    np.testing.assert_allclose(found_KC, [[exact_p(*map(int, case), alternative) for case in row] for row in cases], rtol=1e-12)


def test_no_tests_give_no_p_values() -> None:
    assert fisher_exact_many(np.zeros((0, 3), dtype=int), 1, 1, 5).shape == (0, 3)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"alternative \('less'\) must be one of \('two-sided', 'greater'\)"):
        fisher_exact_many(1, 2, 3, 9, "less")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"hits \(3\) must be >= 0 and <= 2 by the margins of the table"):
        fisher_exact_many([1, 3], 2, 3, 9)
    with pytest.raises(ValueError, match=r"hits \(1\) must be >= 2 and <= 5 by the margins of the table"):
        fisher_exact_many(1, 5, 6, 9)
    with pytest.raises(ValueError, match=r"num_drawn \(10\) must be >= 0 and <= num_total \(9\)"):
        fisher_exact_many(1, 10, 3, 9)
    with pytest.raises(ValueError, match=r"num_marked \(-1\) must be >= 0 and <= num_total \(9\)"):
        fisher_exact_many(0, 2, -1, 9)
