import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.functional.packing import check_packed, pack_ternary, packed_width, unpack_ternary

ternary_rows = st.integers(1, 33).flatmap(
    lambda k: st.lists(st.lists(st.sampled_from([-1, 0, 1]), min_size=k, max_size=k), min_size=1, max_size=5)
)


def test_bit_order_is_the_documented_one() -> None:
    # Columns 0..3 in bits 0-1, 2-3, 4-5, 6-7: +1 -> 01, -1 -> 10; the fifth column starts the next byte.
    packed = pack_ternary(torch.tensor([[1, -1, 0, 1, -1]]))
    assert packed.tolist() == [[0b01_00_10_01, 0b00_00_00_10]]


@given(ternary_rows)
def test_unpack_inverts_pack(rows: list[list[int]]) -> None:
    codes = torch.tensor(rows)
    packed = pack_ternary(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (len(rows), packed_width(len(rows[0])))
    assert torch.equal(unpack_ternary(packed, len(rows[0])).to(codes.dtype), codes)
    check_packed(packed, len(rows[0]))


@pytest.mark.parametrize("bad", [2.0, 0.5, float("nan"), -3.0])
def test_values_that_are_not_ternary_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=rf"codes must be in \{{-1, 0, 1\}}, got {bad}"):
        pack_ternary(torch.tensor([0.0, bad]))


def test_wrong_width_reserved_code_and_padding_are_refused() -> None:
    with pytest.raises(ValueError, match=r"packed width \(2\) must be ceil\(num_columns / 4\) \(1\) for num_columns = 4"):
        unpack_ternary(torch.zeros(3, 2, dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="reserved field 11"):
        check_packed(torch.tensor([[0b11]], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="padding bits"):
        check_packed(torch.tensor([[0b01_00_00_00]], dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match=r"must be torch.uint8, got torch.int64"):
        check_packed(torch.zeros(1, 1, dtype=torch.int64), 4)
