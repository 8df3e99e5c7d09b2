"""The layout of ternary matrices in exported files; the C++ side states it in native/kernels/ternary_panels.hpp.

A matrix of N rows and K columns is cut into panels of 32 rows, and a panel into blocks of 16 columns: uint8
[ceil(N / 32), ceil(K / 16), 128]. Byte 4r + j of a block holds columns j, 4 + j, 8 + j and 12 + j of the block for its row r,
the lowest bits first, each as the code w + 1 (0 to 2; 3 is reserved). Rows and columns past the end hold w = 0.
"""

import numpy as np
from numpy.typing import NDArray

RESERVED_VALUE = 2  # what the reserved code reads as
PANEL_ROWS, BLOCK_COLUMNS, BLOCK_BYTES = 32, 16, 128
_SHIFTS = np.array([0, 2, 4, 6], dtype=np.uint8)


def to_panels(ternary: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Values of {-1, 0, +1} [..., N, K] as uint8 [..., ceil(N / 32), ceil(K / 16), 128].

    Raises:
        ValueError: another value.
    """
    if ternary.size and (ternary.min() < -1 or ternary.max() > 1):
        raise ValueError(f"values ({ternary.min()} to {ternary.max()}) must be in {{-1, 0, 1}}")
    *outer, num_rows, num_columns = ternary.shape
    padding = [(0, 0)] * len(outer) + [(0, -num_rows % PANEL_ROWS), (0, -num_columns % BLOCK_COLUMNS)]
    codes = np.pad(ternary.astype(np.int8), padding).astype(np.uint8) + np.uint8(1)
    # [..., panel, row, block, field, j]: a byte gathers the fields of one j.
    panels, blocks = codes.shape[-2] // PANEL_ROWS, codes.shape[-1] // BLOCK_COLUMNS
    fields = codes.reshape(*outer, panels, PANEL_ROWS, blocks, 4, 4)
    packed = (fields << _SHIFTS[:, None]).sum(-2, dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(packed, -2, -3)).reshape(*outer, panels, blocks, BLOCK_BYTES)


def from_panels(panels: NDArray[np.uint8], num_rows: int, num_columns: int) -> NDArray[np.int8]:
    """The inverse of :func:`to_panels`: int8 [..., N, K]; the reserved code reads as 2.

    Raises:
        ValueError: the panels are not those of N rows and K columns.
    """
    expected = (-(-num_rows // PANEL_ROWS), -(-num_columns // BLOCK_COLUMNS), BLOCK_BYTES)
    if panels.shape[-3:] != expected:
        raise ValueError(f"panels {panels.shape} must end in {expected} for {num_rows} rows and {num_columns} columns")
    *outer, num_panels, num_blocks, _ = panels.shape
    packed = np.moveaxis(panels.reshape(*outer, num_panels, num_blocks, PANEL_ROWS, 4), -2, -3)
    fields = (packed[..., None, :] >> _SHIFTS[:, None]) & 3
    codes = fields.astype(np.int8).reshape(*outer, num_panels * PANEL_ROWS, num_blocks * BLOCK_COLUMNS) - np.int8(1)
    return codes[..., :num_rows, :num_columns]
