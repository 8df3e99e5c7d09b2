"""Fisher's exact test on many 2 x 2 tables at once.

Legend: S tests, R distinct pairs of margins, W width of the support of the widest of them.
"""

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

Alternative = Literal["two-sided", "greater"]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

TABLE_ENTRIES = 1 << 14  # probabilities held at once; an array of them fits into a second-level cache
TIE = 1e-11  # relative: above the rounding of a product of ratios, far below the gap between two different probabilities


def fisher_exact_many(
    hits: npt.ArrayLike,
    num_drawn: npt.ArrayLike,
    num_marked: npt.ArrayLike,
    num_total: int,
    alternative: Alternative = "two-sided",
) -> FloatArray:
    """p-values of Fisher's exact test: float64 of the shape that the first three arguments broadcast to.

    The table of a test is [[hits, drawn - hits], [marked - hits, total - drawn - marked + hits]]. Under the null hypothesis the
    number of hits x is hypergeometric:

        P(x) = C(marked, x) C(total - marked, drawn - x) / C(total, drawn).

    "greater" sums P over x >= hits, "two-sided" over all x with P(x) <= P(hits), as scipy.stats.fisher_exact does. Where a
    margin is empty, p is 1.

    Tests with the same margins share one row of a table of probabilities. A row begins at the mode of P and multiplies the
    ratios P(x + 1) / P(x) outwards. Each ratio is exact to rounding, so the relative error is at most 1e-16 times the width of
    the row. Differences of log-factorials lose digits as the total grows.

    Args:
        hits: drawn objects that are marked, int.
        num_drawn: objects drawn, int.
        num_marked: marked objects, int.
        num_total: all objects.

    Raises:
        ValueError: counts that no table has, or an unknown alternative.
    """
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative ({alternative!r}) must be one of {get_args(Alternative)}")
    counts = [np.asarray(part, dtype=np.int64) for part in (hits, num_drawn, num_marked)]
    shape = np.broadcast_shapes(*(part.shape for part in counts))
    hits_S, drawn_S, marked_S = (np.broadcast_to(part, shape).ravel() for part in counts)
    _check(hits_S, drawn_S, marked_S, num_total)

    # P is the same with drawn and marked exchanged. Sorted by the smaller of the two, the rows of a table are about as wide.
    pair_S = np.minimum(drawn_S, marked_S) * (num_total + 1) + np.maximum(drawn_S, marked_S)
    order_S = np.argsort(pair_S, kind="stable")
    pair_S, hits_S = pair_S[order_S], hits_S[order_S]
    is_first_S = np.diff(pair_S, prepend=-1) > 0
    first_R, row_S = np.flatnonzero(is_first_S), np.cumsum(is_first_S) - 1
    small_R, large_R = np.divmod(pair_S[first_R], num_total + 1)
    low_R = np.maximum(0, small_R + large_R - num_total)
    width_R = small_R - low_R + 1

    p_S = np.empty(len(hits_S))
    for start, stop in _chunks(width_R):
        rows = slice(start, stop)
        weight_RW = _weights(small_R[rows], large_R[rows], low_R[rows], num_total, int(width_R[rows].max()))
        p_RW = _upper_tails(weight_RW) if alternative == "greater" else _two_tails(weight_RW)
        tests = slice(first_R[start], first_R[stop] if stop < len(first_R) else None)
        row = row_S[tests]
        p_S[order_S[tests]] = p_RW[row - start, hits_S[tests] - low_R[row]]
    return np.minimum(p_S, 1.0).reshape(shape)


def _check(hits_S: IntArray, drawn_S: IntArray, marked_S: IntArray, num_total: int) -> None:
    low_S, high_S = np.maximum(0, drawn_S + marked_S - num_total), np.minimum(drawn_S, marked_S)
    for name, count_S in (("num_drawn", drawn_S), ("num_marked", marked_S)):
        is_wrong = (count_S < 0) | (count_S > num_total)
        if is_wrong.any():
            raise ValueError(f"{name} ({count_S[is_wrong][0]}) must be >= 0 and <= num_total ({num_total})")
    is_wrong = (hits_S < low_S) | (hits_S > high_S)
    if is_wrong.any():
        test = int(np.flatnonzero(is_wrong)[0])
        raise ValueError(f"hits ({hits_S[test]}) must be >= {low_S[test]} and <= {high_S[test]} by the margins of the table")


def _chunks(width_R: IntArray) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose table, as wide as the widest of them, has at most TABLE_ENTRIES; at least one row each."""
    start = 0
    while start < len(width_R):
        reach_R = np.maximum.accumulate(width_R[start : start + TABLE_ENTRIES])
        entries_R = np.arange(1, len(reach_R) + 1) * reach_R
        stop = start + max(1, int(np.searchsorted(entries_R, TABLE_ENTRIES, side="right")))
        yield start, stop
        start = stop


def _weights(small_R: IntArray, large_R: IntArray, low_R: IntArray, num_total: int, width: int) -> FloatArray:
    """P(low + column) / P(mode) of each row, 0 past its support: [R, W]."""
    small_R1, large_R1, low_R1 = (part[:, None].astype(np.float64) for part in (small_R, large_R, low_R))
    x_RW = low_R1 + np.arange(width, dtype=np.float64)
    # P(x + 1) / P(x) = up / down, which is >= 1 below the mode and <= 1 from there on. At the end of the support up is 0, and
    # so are all products past it.
    up_RW = np.maximum((small_R1 - x_RW) * (large_R1 - x_RW), 0)
    down_RW = (x_RW + 1) * (x_RW + (num_total - small_R1 - large_R1 + 1))
    right_RW = np.minimum(up_RW / down_RW, 1)
    with np.errstate(divide="ignore"):
        left_RW = np.minimum(down_RW / up_RW, 1)
    weight_RW = left_RW[:, ::-1].cumprod(axis=1)[:, ::-1]
    weight_RW[:, 1:] *= right_RW.cumprod(axis=1)[:, :-1]
    return weight_RW


def _upper_tails(weight_RW: FloatArray) -> FloatArray:
    """P(X >= x) of each entry, the small terms summed first."""
    tail_RW = np.cumsum(weight_RW[:, ::-1], axis=1)[:, ::-1]
    tail_RW /= tail_RW[:, :1].copy()
    return tail_RW


def _two_tails(weight_RW: FloatArray) -> FloatArray:
    """The sum of all weights of the row that are no larger than the entry's, over their total."""
    order_RW = np.argsort(weight_RW, axis=1, kind="stable")  # two monotone runs, which a stable sort merges
    sorted_RW = np.take_along_axis(weight_RW, order_RW, axis=1)
    sum_RW = np.cumsum(sorted_RW, axis=1)
    sum_RW /= sum_RW[:, -1:]
    # Each entry takes the sum at the last of its ties.
    has_tie_RW = sorted_RW[:, 1:] <= sorted_RW[:, :-1] * (1 + TIE)
    place_RW = np.broadcast_to(np.arange(weight_RW.shape[1]), weight_RW.shape).copy()
    place_RW[:, :-1][has_tie_RW] = weight_RW.shape[1]
    last_RW = np.minimum.accumulate(place_RW[:, ::-1], axis=1)[:, ::-1]
    p_RW = np.empty_like(weight_RW)
    np.put_along_axis(p_RW, order_RW, np.take_along_axis(sum_RW, last_RW, axis=1), axis=1)
    return p_RW
