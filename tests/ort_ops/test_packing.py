"""The layout of packed codes in numpy: that of torch's side, and nothing else is taken for it."""

import numpy as np
import pytest
import torch

from ort_ops.packing import pack, unpack
from trix.functional.packing import pack_ternary


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 7), (2, 5, 10), (2, 0, 8), (3, 0)])
def test_it_is_the_layout_of_torch(shape: tuple[int, ...]) -> None:
    ternary = np.random.default_rng(0).integers(-1, 2, shape)
    assert np.array_equal(pack(ternary), pack_ternary(torch.from_numpy(ternary)).numpy())
    assert np.array_equal(unpack(pack(ternary), shape[-1]), ternary)


@pytest.mark.parametrize(
    ("packed", "num_columns", "message"),
    [
        ([0, 0], 4, r"bytes of a packed row \(2\) must be those of 4 columns"),
        ([0], 5, r"bytes of a packed row \(1\) must be those of 5 columns"),
        ([0b1100], 4, "packed codes must be 0, 1 or 2, there is a 3"),
    ],
)
def test_what_is_not_packed_so_is_refused(packed: list[int], num_columns: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack(np.array(packed, dtype=np.uint8), num_columns)
