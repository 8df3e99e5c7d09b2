import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.routing.diversity import collapsed_tiles, lowered_weight, raised_weight, reseeded


def test_one_of_each_group_of_duplicates_is_kept() -> None:
    a, b = torch.tensor([1.0, 1, 0, -1, 0, 0, 1, 1, -1, 0]), torch.tensor([-1.0, 1, 0, 0, 1, 0, -1, 0, 1, 0])
    near_a = a.clone()
    near_a[0] = 0  # one position of ten
    signatures = torch.stack([a, b, a, near_a, b])
    assert collapsed_tiles(signatures, min_difference=0.0).tolist() == [False, False, True, False, True]
    assert collapsed_tiles(signatures, min_difference=0.1).tolist() == [False, False, True, True, True]


def test_a_frozen_tile_is_kept_and_its_duplicates_are_not() -> None:
    signatures = torch.ones(3, 4)
    is_frozen = torch.tensor([False, False, True])
    assert collapsed_tiles(signatures, 0.0, is_frozen).tolist() == [True, True, False]
    assert collapsed_tiles(signatures, 0.0, torch.tensor([True, False, True])).tolist() == [False, True, False]
    assert collapsed_tiles(torch.ones(1, 4)).tolist() == [False]
    with pytest.raises(ValueError, match=r"min_difference \(1.0\) must be >= 0 and < 1"):
        collapsed_tiles(signatures, 1.0)


@given(st.floats(0.0, 2.0), st.floats(0.0, 1.0))
def test_the_weight_rises_below_the_threshold_only_and_never_past_the_limit(weight: float, diversity: float) -> None:
    raised = raised_weight(weight, diversity, threshold=0.4, limit=1.0)
    assert raised >= weight
    assert raised <= max(weight, 1.0)
    if diversity >= 0.4:
        assert raised == weight
    elif weight < 1.0:
        assert raised > weight


def test_the_weight_starts_from_zero_and_doubles() -> None:
    assert raised_weight(0.0, 0.1, limit=1.0) == pytest.approx(0.01)
    assert raised_weight(0.01, 0.1) == pytest.approx(0.02)
    with pytest.raises(ValueError, match=r"growth \(1.0\) must be > 1"):
        raised_weight(0.1, 0.1, growth=1.0)


@given(st.floats(0.0, 2.0), st.floats(0.0, 1.0))
def test_the_weight_falls_back_to_the_least_and_never_rises(weight: float, least: float) -> None:
    lowered = lowered_weight(weight, least)
    assert lowered <= weight
    assert lowered >= min(weight, least)
    for _ in range(10):
        lowered = lowered_weight(lowered, least)
    assert lowered == min(weight, least)


def test_the_weight_halves_and_drops_to_zero_where_raising_began() -> None:
    assert lowered_weight(0.04, 0.0) == pytest.approx(0.02)
    assert lowered_weight(0.01, 0.0) == 0.0
    with pytest.raises(ValueError, match=r"least \(-0.1\) >= 0"):
        lowered_weight(0.1, -0.1)


def test_reseeding_replaces_collapsed_tiles_alone() -> None:
    value, fresh = torch.zeros(3, 2, 2), torch.ones(3, 2, 2)
    result = reseeded(value, torch.tensor([False, True, False]), fresh)
    assert result[1].eq(1).all()
    assert result[[0, 2]].eq(0).all()
    assert value.eq(0).all()
