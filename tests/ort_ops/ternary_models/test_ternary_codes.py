"""Codes and scales of Hugging Face's files, against references that go value by value."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from ternary_folders import pack

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.ternary_codes import quantise_master, scale_of_codes, unpack_rows

CODES = st.integers(-1, 1)


@given(st.tuples(st.integers(1, 5), st.integers(1, 7)).flatmap(lambda s: hnp.arrays(np.int8, (4 * s[0], s[1]), elements=CODES)))
def test_packed_codes_come_back(code_NK: np.ndarray) -> None:
    np.testing.assert_array_equal(unpack_rows(pack(code_NK), "w"), code_NK, strict=True)


def test_the_fields_of_a_byte_are_blocks_of_rows() -> None:
    """Not neighbouring rows, nor columns."""
    packed = np.array([[0b10010001], [0b00000110]], dtype=np.uint8)
    np.testing.assert_array_equal(unpack_rows(packed, "w")[:, 0], [0, 1, -1, 0, 0, -1, 1, -1])


@given(hnp.arrays(np.uint8, (3, 4)))
def test_the_code_3_is_refused_and_no_other(packed_RK: np.ndarray) -> None:
    reserved = [
        (row, column)
        for row in range(3)
        for column in range(4)
        if any(int(packed_RK[row, column]) >> shift & 3 == 3 for shift in (0, 2, 4, 6))
    ]
    if not reserved:
        assert set(unpack_rows(packed_RK, "w").flat) <= {-1, 0, 1}
        return
    row, column = reserved[0]
    with pytest.raises(CheckpointError, match=rf"w: byte \[{row}, {column}\] \(0x.*\) must hold only the codes 0, 1 and 2"):
        unpack_rows(packed_RK, "w")


@given(hnp.arrays(np.float32, (4, 5), elements=st.floats(-8, 8, width=16)))
def test_a_master_is_rounded_value_by_value(weight_NK: np.ndarray) -> None:
    matrix = quantise_master(weight_NK, "w")
    factor = np.float32(1) / max(np.float32(sum(map(abs, weight_NK.ravel().tolist())) / weight_NK.size), np.float32(1e-5))
    for code, weight in zip(matrix.code_NK.flat, weight_NK.flat, strict=True):
        assert code == max(-1, min(1, round(float(weight * factor))))  # Python rounds ties to even, too
    assert matrix.scale == np.float32(1) / factor
    assert matrix.code_NK.dtype == np.int8
    assert matrix.scale.dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_ties_go_to_even(dtype: type) -> None:
    """mean |w| is 1, so that w is rounded as it stands."""
    weight = np.array([[0.5, -0.5, 1.5, -1.5, 1.0, 1.0]], dtype=dtype).astype(np.float32)
    np.testing.assert_array_equal(quantise_master(weight, "w").code_NK, [[0, 0, 1, -1, 1, 1]])


def test_a_master_of_zeros_has_the_smallest_scale() -> None:
    matrix = quantise_master(np.zeros((4, 4), np.float32), "w")
    assert not matrix.code_NK.any()
    assert matrix.scale == pytest.approx(1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_master_must_be_finite(value: float) -> None:
    weight = np.ones((4, 4), np.float32)
    weight[2, 1] = value
    with pytest.raises(CheckpointError, match=r"w: mean \|weight\| \((nan|inf)\) must be finite"):
        quantise_master(weight, "w")


def test_the_scale_is_stored_as_it_is_or_as_its_inverse() -> None:
    stored = np.float32(0.3)
    assert scale_of_codes(stored, is_factor=True, name="s") == stored
    assert scale_of_codes(stored, is_factor=False, name="s") == np.float32(1) / stored


@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, np.nan, np.inf, 1e-45])
@pytest.mark.parametrize("is_factor", [True, False])
def test_a_scale_must_be_positive_and_have_an_inverse(value: float, is_factor: bool) -> None:
    with pytest.raises(CheckpointError, match=r"s \(.*\) must be > 0 and finite, and so must be its inverse"):
        scale_of_codes(np.float32(value), is_factor, "s")
