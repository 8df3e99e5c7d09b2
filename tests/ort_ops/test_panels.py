"""The layout of ternary matrices in exported files."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ort_ops.panels import from_panels, to_panels


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 70), st.integers(0, 70), st.sampled_from([(), (3,), (2, 2)]))
def test_panels_come_back(seed: int, num_rows: int, num_columns: int, outer: tuple[int, ...]) -> None:
    ternary = np.random.default_rng(seed).integers(-1, 2, (*outer, num_rows, num_columns))
    panels = to_panels(ternary)
    assert panels.shape == (*outer, -(-num_rows // 32), -(-num_columns // 16), 128)
    np.testing.assert_array_equal(from_panels(panels, num_rows, num_columns), ternary)


def test_the_place_of_a_code() -> None:
    ternary = np.zeros((40, 20), np.int8)
    ternary[33, 16 + 3], ternary[2, 9] = 1, -1
    panels = to_panels(ternary)
    assert panels[1, 1, 4 * 1 + 3] == 0b01_01_01_10
    assert panels[0, 0, 4 * 2 + 1] == 0b01_00_01_01
    assert (panels == 0x55).sum() == panels.size - 2


def test_other_values_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"values \(-1 to 2\) must be in \{-1, 0, 1\}"):
        to_panels(np.array([[2, -1]]))
    with pytest.raises(ValueError, match=r"panels \(1, 1, 128\) must end in \(2, 1, 128\) for 33 rows and 4 columns"):
        from_panels(np.zeros((1, 1, 128), np.uint8), 33, 4)
