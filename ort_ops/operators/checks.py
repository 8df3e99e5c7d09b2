"""What the checks of the operators share: how a node is run, sizes, and how far a result is from numpy's."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ort_ops.schema import OpSchema

Array = NDArray[Any]

# Tokens, tiles, rows of a tile, columns of x, chosen tiles per token: no multiples of any vector width.
NUM_TOKENS, NUM_TILES, NUM_ROWS, NUM_COLUMNS, TOP_K = 9, 5, 11, 67, 2


class Run(Protocol):
    """Runs one node of an operator, with the native kernels or by the portable function, and returns its outputs."""

    def __call__(self, op: OpSchema, feeds: Mapping[str, Array], **attributes: float) -> Sequence[Array]: ...


def relative_error(found: Array, expected: NDArray[np.float64]) -> float:
    """Largest error relative to the greatest value; NaN where one is."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
