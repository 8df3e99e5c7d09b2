"""The 2-bit layout of trix/functional/packing.py in numpy, for where there is no torch."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


def pack(ternary: NDArray[Any]) -> NDArray[np.uint8]:
    """[..., K] in {-1, 0, +1} to [..., ceil(K/4)]."""
    codes = np.where(ternary < 0, 2, ternary).astype(np.uint8)
    padding = [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 4)]
    fields = np.pad(codes, padding).reshape(*codes.shape[:-1], -(-codes.shape[-1] // 4), 4)
    return (fields << _SHIFTS).sum(-1, dtype=np.uint8)


def unpack(packed: NDArray[np.uint8], num_columns: int) -> NDArray[np.int8]:
    """The inverse of :func:`pack`: [..., num_columns].

    Raises:
        ValueError: too few or too many bytes for so many columns, or a code that stands for no value.
    """
    codes = (packed[..., None] >> _SHIFTS & 3).reshape(*packed.shape[:-1], 4 * packed.shape[-1])
    if packed.shape[-1] != -(-num_columns // 4):
        raise ValueError(f"bytes of a packed row ({packed.shape[-1]}) must be those of {num_columns} columns")
    if (codes == 3).any():
        raise ValueError("packed codes must be 0, 1 or 2, there is a 3")
    return np.where(codes == 2, -1, codes).astype(np.int8)[..., :num_columns]
