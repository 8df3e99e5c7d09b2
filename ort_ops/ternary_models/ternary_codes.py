"""Ternary matrices as Hugging Face files hold them: packed codes with a scale, or master weights.

Legend: N rows, K columns, R rows of the packed form, N / 4.
"""

import numpy as np
from numpy.typing import NDArray

from ort_ops.ternary_models.errors import CheckpointError
from ort_ops.ternary_models.types import TernaryMatrix

CODES_PER_BYTE = 4
MIN_SCALE = np.float32(1e-5)


def unpack_rows(packed_RK: NDArray[np.uint8], name: str) -> NDArray[np.int8]:
    """Codes [4 R, K] in {-1, 0, 1}: bits 2i and 2i + 1 of byte [r, k] hold the code + 1 of row i * R + r.

    Source: ``pack_weights`` of transformers.integrations.bitnet.

    Raises:
        CheckpointError: the reserved value 3.
    """
    is_reserved_RK = (packed_RK & (packed_RK >> 1) & 0b01010101) != 0
    if is_reserved_RK.any():
        row, column = (int(place) for place in np.unravel_index(is_reserved_RK.argmax(), is_reserved_RK.shape))
        byte = int(packed_RK[row, column])
        raise CheckpointError(f"{name}: byte [{row}, {column}] (0x{byte:02x}) must hold only the codes 0, 1 and 2, it holds 3")
    num_rows, num_columns = packed_RK.shape
    code_NK = np.empty((CODES_PER_BYTE * num_rows, num_columns), dtype=np.int8)
    for field in range(CODES_PER_BYTE):
        code_NK[field * num_rows : (field + 1) * num_rows] = (packed_RK >> (2 * field) & 3).astype(np.int8) - np.int8(1)
    return code_NK


def quantise_master(weight_NK: NDArray[np.float32], name: str) -> TernaryMatrix:
    """code = clip(round(W f), -1, 1), ties to even, and scale = 1 / f with f = 1 / max(mean |W|, 1e-5) over the whole matrix.

    As ``WeightQuant`` of transformers.integrations.bitnet computes it, in float32; the mean is summed in float64 and rounded
    once, as torch's own depends on the number of its threads.

    Raises:
        CheckpointError: a weight that is not finite, or weights so large that their sum is not.
    """
    mean = np.float32(np.abs(weight_NK).mean(dtype=np.float64))
    if not np.isfinite(mean):
        raise CheckpointError(f"{name}: mean |weight| ({mean}) must be finite")
    factor = np.float32(1) / max(mean, MIN_SCALE)
    scaled_NK = np.rint(weight_NK * factor)
    return TernaryMatrix(np.clip(scaled_NK, -1, 1, out=scaled_NK).astype(np.int8), np.float32(1) / factor)


def scale_of_codes(stored: np.float32, is_factor: bool, name: str) -> np.float32:
    """The scale of packed codes: what is stored where it is a factor (autobitlinear), else its inverse (bitlinear).

    Raises:
        CheckpointError: not a positive number with an inverse.
    """
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inverse = np.float32(1) / stored
    if not (stored > 0 and np.isfinite(stored) and np.isfinite(inverse)):
        raise CheckpointError(f"{name} ({stored}) must be > 0 and finite, and so must be its inverse ({inverse})")
    return stored if is_factor else inverse
