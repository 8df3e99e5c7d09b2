"""The weights of a decoder as its graph reads them: ternary ones in panels or in 2 bits, matrices of floats in int8, rotations.

Legend: N rows, K columns of a matrix, V rows of the embedding and the head, S positions, H half of a head's size.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ort_ops.ternary_models.types import TernaryMatrix

BLOCK = 32  # columns that share a scale in int8
ZERO_INT8 = 128  # the code of 0
BLOCK_2BIT = 128
ZERO_2BIT = 2
_LEVELS = np.float32(127)
_ROWS_AT_ONCE = 4096


def stack(matrices: Sequence[TernaryMatrix]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """One matrix of the rows of all, and the scale of each row, float32 [N]."""
    code_NK = np.concatenate([matrix.code_NK for matrix in matrices]) if len(matrices) > 1 else matrices[0].code_NK
    scales = [np.broadcast_to(np.asarray(matrix.scale, np.float32), matrix.code_NK.shape[:1]) for matrix in matrices]
    return code_NK, np.concatenate(scales)


def two_bit(code_NK: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes as com.microsoft.MatMulNBits reads them with bits=2, block_size=128 and no zero points: uint8 [N, K / 128, 32].

    Four columns a byte, the lowest bits first, each w + 2. Columns past the end hold w = 0.
    """
    padded_NK = np.pad(code_NK, ((0, 0), (0, -code_NK.shape[1] % BLOCK_2BIT))).astype(np.uint8) + np.uint8(ZERO_2BIT)
    field_NBJ4 = padded_NK.reshape(len(code_NK), -1, BLOCK_2BIT // 4, 4)
    return (field_NBJ4 << np.array([0, 2, 4, 6], np.uint8)).sum(-1, dtype=np.uint8)


def int8_scales(matrix_VK: NDArray[np.float32]) -> NDArray[np.float32]:
    """max |w| / 127 of each block of 32 columns: float32 [V, K / 32]."""
    blocks = matrix_VK.reshape(len(matrix_VK), -1, BLOCK)
    scale_VB = np.empty(blocks.shape[:2], np.float32)
    for rows in _parts(len(matrix_VK)):
        scale_VB[rows] = np.abs(blocks[rows]).max(-1) / _LEVELS
    return scale_VB


def int8_codes(matrix_VK: NDArray[np.float32], scale_VB: NDArray[np.float32]) -> Iterator[NDArray[np.uint8]]:
    """round(w / scale) + 128, ties to even, as com.microsoft.MatMulNBits reads them with bits=8 and no zero points.

    Yields uint8 [some rows, K / 32, 32], which together are [V, K / 32, 32].
    """
    blocks = matrix_VK.reshape(len(matrix_VK), -1, BLOCK)
    for rows in _parts(len(matrix_VK)):
        scale = scale_VB[rows, :, None]
        code = np.rint(np.divide(blocks[rows], scale, out=np.zeros_like(blocks[rows]), where=scale > 0))
        yield (code.clip(-_LEVELS, _LEVELS) + np.float32(ZERO_INT8)).astype(np.uint8)


def rows_as(matrix_VK: NDArray[np.float32], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """The rows as another kind of float, some at a time."""
    for rows in _parts(len(matrix_VK)):
        yield matrix_VK[rows].astype(dtype)


def rotations(num_positions: int, head_size: int, theta: float) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """cos and sin of s * theta^(-2 h / head_size), float32 [S, H] each.

    In float32 throughout, as models are trained: at large angles float64 would be another function.
    Source: Su et al., 2021, RoFormer (arXiv:2104.09864); which pairs of channels turn is the attention's affair.
    """
    exponent_H = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    frequency_H = np.float32(1) / np.float32(theta) ** exponent_H
    angle_SH = np.arange(num_positions, dtype=np.float32)[:, None] * frequency_H
    return np.cos(angle_SH), np.sin(angle_SH)


def _parts(num_rows: int) -> Iterator[slice]:
    for begin in range(0, num_rows, _ROWS_AT_ONCE):
        yield slice(begin, begin + _ROWS_AT_ONCE)
