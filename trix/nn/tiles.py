"""The experts of a routed layer, and the project's own kind: two-layer perceptrons with ternary weights."""

from abc import ABC, abstractmethod
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.tile_matmul import group_tokens, grouped_linear, ternary_ffn
from trix.nn.ternary_weight import TernaryWeight
from trix.routing.diversity import reseeded


class Tiles(nn.Module, ABC):
    """What every kind of tiles offers to a routed layer: y[t] = sum_k weight[t, k] * tile_e(x[t]) with e = tile_idx[t, k].

    They are made as ``Tiles(d_model, num_tiles, tile_width, **tiles_args)``. What is defined here holds for tiles whose
    weights are :class:`~trix.nn.ternary_weight.TernaryWeight` [E, ...], the first of which reads the tokens, [E, H, D].

    Args:
        tile_width: hidden width H of a tile.
    """

    def __init__(self, d_model: int, num_tiles: int, tile_width: int) -> None:
        super().__init__()
        self.d_model, self.num_tiles, self.tile_width = d_model, num_tiles, tile_width

    @abstractmethod
    def forward(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor, skip_unused: bool = False) -> Tensor:
        """x_TD float, tile_idx_TK int64, weight_TK float -> [T, D], in the dtype of x.

        Args:
            skip_unused: some weights are 0, and these assignments may be left out.
        """

    def ternary_weights(self) -> list[TernaryWeight]:
        return [module for module in self.modules() if isinstance(module, TernaryWeight)]

    def votes(self) -> Tensor:
        """What each tile responds to, with a gradient: float [E, D]; emergent signatures are the ternary form of it."""
        weights = self.ternary_weights()
        if not weights:
            raise ValueError(f"{type(self).__name__} holds no TernaryWeight, so it must have votes() of its own")
        return weights[0].votes()

    def tile_parameters(self) -> list[nn.Parameter]:
        """The parameters of which a tile owns a row, [E, ...]."""
        return [ternary.weight for ternary in self.ternary_weights() if ternary.weight is not None]

    @torch.no_grad()
    def redraw(self, is_redrawn_E: Tensor, votes_only: bool = False) -> None:
        """Give some tiles fresh initial weights; ``votes_only``: those alone that the votes are read from.

        Raises:
            ValueError: the weights are packed.
        """
        for ternary in self.ternary_weights()[: 1 if votes_only else None]:
            if ternary.weight is None:
                raise ValueError("the tiles are packed: unpack them before changing their weights")
            ternary.weight.copy_(reseeded(ternary.weight, is_redrawn_E, ternary.draw().to(ternary.weight.device)))

    def pack(self) -> None:
        """Replace float weights by their 2-bit form; inference only afterwards. Idempotent."""
        for ternary in self.ternary_weights():
            ternary.pack()

    def unpack(self) -> None:
        """Undo :meth:`pack`."""
        for ternary in self.ternary_weights():
            ternary.unpack()


class TernaryTiles(Tiles):
    """tile_e(x) = down_e relu(up_e x)^2.

    Squared ReLU: So et al., 2021, "Primer" (arXiv:2109.08668).

    ``skip_unused``: assignments of weight 0 are not multiplied, forward or backward; they cost only their share of the sort and
    of the [T * K, D] buffers. In torch the packed form computes them like any other; exported it leaves them out.
    """

    def __init__(self, d_model: int, num_tiles: int, tile_width: int) -> None:
        super().__init__(d_model, num_tiles, tile_width)
        self.up = TernaryWeight(num_tiles, tile_width, d_model)
        self.down = TernaryWeight(num_tiles, d_model, tile_width)

    def forward(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor, skip_unused: bool = False) -> Tensor:
        if self.up.is_packed:
            return self._packed(x_TD, tile_idx_TK, weight_TK)
        top_k, num_tiles = tile_idx_TK.shape[1], self.up.shape[0]
        tile_idx_S = tile_idx_TK.reshape(-1)  # S = T * K assignments
        if skip_unused:  # sorted behind all tiles, as the rest that belongs to no group
            tile_idx_S = torch.where(weight_TK.reshape(-1) == 0, num_tiles, tile_idx_S)
        groups = group_tokens(tile_idx_S, num_tiles)
        x_SD = x_TD[groups.order if top_k == 1 else groups.order // top_k]
        product = partial(grouped_linear, ends=groups.ends, has_rest=skip_unused, in_blocks=not self.training)
        hidden_SH = F.relu(product(x_SD, self.up.ternary())).square()
        y_SD = product(hidden_SH, self.down.ternary())[groups.inverse]
        y_TKD = y_SD.reshape(*tile_idx_TK.shape, x_TD.shape[-1]) * weight_TK.unsqueeze(-1).to(y_SD.dtype)
        return y_TKD.sum(dim=1)

    def _packed(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        up, down = self.up, self.down
        assert up.packed is not None
        assert up.row_scale is not None
        assert down.packed is not None
        assert down.row_scale is not None
        return ternary_ffn(x_TD, tile_idx_TK, weight_TK, up.packed, up.row_scale, down.packed, down.row_scale)
