"""The vocabulary between layers: what a router decides, what a routed layer reports, what it adds to the loss.

Shape suffixes in the whole package: B batch, T tokens, D model width, E tiles, K chosen tiles, H hidden width of a tile,
C classes, N output rows, P packed bytes of a row.
"""

from typing import NamedTuple, TypedDict

from torch import Tensor


class RoutingDecision(NamedTuple):
    """Which tiles each token goes to.

    tile_idx: int64 [T, K] in [0, E), best first. weight: float [T, K], the factor on each chosen tile's output.
    score: float [T, E], the agreement of token and signature (unit: activation standard deviations), without balance bias.
    """

    tile_idx: Tensor
    weight: Tensor
    score: Tensor


class RoutingInfo(TypedDict):
    """What a routed layer reports, in the shape of its input ([B, T, ...] or [B, ...]).

    tile_idx: int64 [..., K]. weight: float [..., K]. scores: float [..., E].
    """

    tile_idx: Tensor
    weight: Tensor
    scores: Tensor


class AuxLosses(TypedDict):
    """Auxiliary losses, each a scalar already multiplied by its weight; a disabled one is exactly 0.

    balance: pressure toward equal load. total_aux: the sum, to be added to the task's loss.
    """

    balance: Tensor
    total_aux: Tensor
