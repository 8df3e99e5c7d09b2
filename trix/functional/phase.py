"""From the phase of a resolvent to the tiles next to it.

Everything here is pointwise, and made of operations that torch rounds alike in vector code and in the rest of a row: a token's
tiles are the same bits in every prefix and in every row of a batch.

Legend: E tiles, K tiles per token; leading dimensions are any.
"""

import math

import torch
from torch import Tensor

from trix.functional.resolvent import Pair

WIDTH = 0.75  # how far a tile reaches, in tiles


def resolvent_phase(G: Pair) -> Tensor:
    """arg G modulo pi = arccot(Re G / Im G) = pi/2 - atan(Re G / Im G), in radians from 0 to pi, of the shape of G.

    For a resolvent (Im G > 0) this is arg G. Not by atan2, whose last bit depends on the length of the row. NaN where G = 0.
    """
    return 0.5 * math.pi - torch.atan(G.re / G.im)


def nearest_tiles(place: Tensor, num_tiles: int, top_k: int) -> Tensor:
    """The K tiles whose centres e + 1/2 are nearest to the place u in [0, E], in ascending order: int64 [..., K].

    lo = clamp(round(u - K/2), 0, E - K), then lo, ..., lo + K - 1.
    """
    low = (place.detach() - 0.5 * top_k).round().long().clamp(0, num_tiles - top_k)  # in this order NaN names a tile, too
    return low.unsqueeze(-1) + torch.arange(top_k, device=place.device)


def place_score(place: Tensor, tile_idx: Tensor) -> Tensor:
    """-(u - (e + 1/2))^2 / (2 * 0.75^2) of the place u [...] and tiles e [..., K]; its softmax weighs the tiles."""
    return (place.unsqueeze(-1) - (tile_idx.to(place.dtype) + 0.5)).square() / (-2.0 * WIDTH * WIDTH)
