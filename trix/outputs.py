"""The vocabulary between layers: what a router decides, what a routed layer reports, what it adds to the loss.

Shape suffixes in the whole package: B batch, T tokens, D model width, E tiles, K chosen tiles, H hidden width of a tile,
C classes, N output rows, P packed bytes of a row.
"""

from typing import NamedTuple, TypedDict

from torch import Tensor


class RoutingDecision(NamedTuple):
    """Which tiles each token goes to.

    tile_idx: int64 [T, K] in [0, E), best first. weight: float [T, K], the factor on each chosen tile's output; a tile of
    weight 0 is named only to keep the shape and is not used (adaptive k).
    score: float [T, E], the agreement of token and signature (unit: activation standard deviations), without balance bias.
    """

    tile_idx: Tensor
    weight: Tensor
    score: Tensor


class RoutingInfo(TypedDict):
    """What a routed layer reports, in the shape of its input ([B, T, ...] or [B, ...]).

    tile_idx: int64 [..., K]. weight: float [..., K], 0 for a tile that is not used. scores: float [..., E], -inf for a tile
    that a hierarchical search did not take into account.
    """

    tile_idx: Tensor
    weight: Tensor
    scores: Tensor


class LookupInfo(TypedDict):
    """What a sparse lookup layer reports, in the shape of its input.

    tile_idx: int64 [...], or [..., K] with more than one tile per token. weight: float, the same shape, the gate on the tile's
    output. compressed: float [..., 2] in (-1, 1), where the
    token stands in the plane of the splines. scores: float [..., E].
    """

    tile_idx: Tensor
    weight: Tensor
    compressed: Tensor
    scores: Tensor


class AuxLosses(TypedDict):
    """Auxiliary losses, each a scalar already multiplied by its weight; a disabled one is exactly 0.

    balance: pressure toward equal load. ternary: toward signature values in {-1, 0, +1}. sparsity: toward few active dimensions
    in a signature. diversity: toward signatures that differ. total_aux: the sum, to be added to the task's loss.
    """

    balance: Tensor
    ternary: Tensor
    sparsity: Tensor
    diversity: Tensor
    total_aux: Tensor
