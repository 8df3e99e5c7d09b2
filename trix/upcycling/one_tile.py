"""The feed-forward layers that can be cut into tiles, and the cut.

Legend: T tokens, D model width, F neurons of the layer, E tiles, H = F / E neurons of a tile.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.ternary import absmean_codes, absmean_ternary, weight_of_codes
from trix.nn.dense import DenseFFN
from trix.nn.ffn import TriXFFN
from trix.nn.tiles import TernaryTiles


class OneTile(NamedTuple):
    """y = down relu(up x)^2 with the ternary forms of two float weights: up_FD [F, D] and down_DF [D, F]."""

    up_FD: Tensor
    down_DF: Tensor

    def hidden(self, x_TD: Tensor) -> Tensor:
        """relu(up x)^2: [T, F]."""
        return F.relu(F.linear(x_TD, absmean_ternary(self.up_FD))).square()

    def output(self, hidden_TF: Tensor) -> Tensor:
        """down h: [T, D]."""
        return F.linear(hidden_TF, absmean_ternary(self.down_DF))

    def tile_outputs(self, hidden_TF: Tensor, groups_EH: Tensor) -> Tensor:
        """What each group of neurons adds to the output: [T, E, D]."""
        hidden_ETH = hidden_TF[:, groups_EH].transpose(0, 1)
        down_EHD = absmean_ternary(self.down_DF).T[groups_EH]
        return (hidden_ETH @ down_EHD).transpose(0, 1)


def one_tile(layer: nn.Module | None) -> OneTile:
    """The weights of a layer that can be cut: a :class:`~trix.nn.TriXFFN` of one tile, or a dense layer, whose float weights
    are then seen through the quantiser of the tiles.

    Raises:
        ValueError: a layer of another kind, with tiles of another kind, packed, or with several tiles.
    """
    if isinstance(layer, DenseFFN):
        return OneTile(layer.up.weight.detach(), layer.down.weight.detach())
    if not isinstance(layer, TriXFFN) or type(layer.tiles) is not TernaryTiles:
        kind = type(layer.tiles if isinstance(layer, TriXFFN) else layer).__name__
        raise ValueError(f"feed-forward layer ({kind}) must be dense, or a TriXFFN of one tile of kind TernaryTiles")
    if layer.num_tiles != 1:
        raise ValueError(f"num_tiles ({layer.num_tiles}) of the layer must be 1: it is cut into tiles already")
    up, down = layer.tiles.up.weight, layer.tiles.down.weight
    if up is None or down is None:
        raise ValueError("the layer is packed: unpack it before it is cut")
    return OneTile(up.detach()[0], down.detach()[0])


def up_of_tiles(value_FD: Tensor, groups_EH: Tensor) -> Tensor:
    """The rows of each group: [E, H, D]."""
    return value_FD[groups_EH]


def down_of_tiles(value_DF: Tensor, groups_EH: Tensor) -> Tensor:
    """The columns of each group: [E, D, H]."""
    return value_DF[:, groups_EH].transpose(0, 1)


def tile_weights(layer: OneTile, groups_EH: Tensor) -> tuple[Tensor, Tensor]:
    """Float weights of the tiles' up [E, H, D] and down [E, D, H], with the very codes and scales of the layer.

    A row of ``up`` moves as it is. A row of ``down`` is dealt out over the tiles, and each part keeps the scale of the whole
    row, so its float values are made anew (:func:`~trix.functional.ternary.weight_of_codes`).
    """
    codes_DF, scale_D = absmean_codes(layer.down_DF)
    codes_EDH = down_of_tiles(codes_DF, groups_EH)
    return up_of_tiles(layer.up_FD, groups_EH), weight_of_codes(codes_EDH, scale_D.expand(codes_EDH.shape[:2]))
