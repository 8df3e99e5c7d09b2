import numpy as np
import pytest

from ort_ops.parity import compare, drift, relative_difference, selection_gap


def test_relative_difference_by_hand() -> None:
    assert relative_difference(np.array([1.0, -4.0]), np.array([1.0, -4.4])) == pytest.approx(0.4 / 4.4)
    assert relative_difference(np.array([np.nan]), np.array([1.0])) == float("inf")
    with pytest.raises(ValueError, match=r"actual \(2,\) and expected \(3,\) must have the same shape"):
        relative_difference(np.zeros(2), np.zeros(3))


def test_selection_gap_is_between_the_last_chosen_and_the_first_not() -> None:
    score = np.array([[5.0, 1.0, 4.0, 2.5]])
    assert selection_gap(score, 1).tolist() == [1.0]
    assert selection_gap(score, 2).tolist() == [1.5]
    assert selection_gap(score, 4).tolist() == [np.inf]


def routed(different_at: tuple[int, int], near_tie_at: tuple[int, int] | None) -> int:
    expected = np.zeros((1, 3, 2, 1), dtype=np.int64)  # three tokens, two layers
    actual = expected.copy()
    actual[0, different_at[0], different_at[1]] = 1
    gap = np.ones((1, 3, 2))
    if near_tie_at:
        gap[0, near_tie_at[0], near_tie_at[1]] = 1e-7
    logits = np.ones((1, 3, 4))
    parity = compare(logits, logits, actual, expected, gap)
    assert parity.routing_agreement == pytest.approx(5 / 6)
    return parity.num_unexplained


def test_a_difference_is_explained_by_its_own_tie_or_by_one_at_an_earlier_layer() -> None:
    assert routed((1, 0), near_tie_at=None) == 1
    assert routed((1, 0), near_tie_at=(1, 0)) == 0
    assert routed((1, 0), near_tie_at=(0, 0)) == 1  # another token, same layer: no excuse
    assert routed((2, 1), near_tie_at=(0, 0)) == 0  # passed on by attention
    assert routed((1, 0), near_tie_at=(1, 1)) == 1  # a later layer


def test_shapes_that_only_broadcast_are_refused() -> None:
    logits, tile_idx, gap = np.ones((1, 3, 4)), np.zeros((1, 3, 2, 1), dtype=np.int64), np.ones((1, 3, 2))
    with pytest.raises(ValueError, match=r"actual \(1, 3, 2, 1\) and expected \(1,\), must have the same shape"):
        compare(logits, logits, tile_idx, tile_idx[0, 0, 0], gap)
    with pytest.raises(ValueError, match=r"and gap \(3, 2\) theirs without the last axis"):
        compare(logits, logits, tile_idx, tile_idx, gap[0])


def test_drift_is_the_rms_of_the_difference_and_the_shares_that_stay() -> None:
    expected = np.array([[[3.0, 0.0, 4.0], [0.0, 5.0, 0.0]]])
    actual = expected + np.array([[[1.0, 0.0, -2.0], [0.0, 0.0, 0.0]]])
    idx = np.array([[[[0, 1]], [[2, 3]]]])
    found = drift(actual, idx[:, :, :, ::-1], expected, idx)
    assert found.relative_rms_difference == pytest.approx((5 / 50) ** 0.5)
    assert (found.top_agreement, found.routing_agreement) == (0.5, 1.0)
    assert drift(expected, idx, expected, (idx + idx % 2) % 4).routing_agreement == 0.0
    assert drift(expected, None, expected, None).routing_agreement == 1.0
