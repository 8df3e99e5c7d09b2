"""The experts of a TriX layer: each a two-layer perceptron with ternary weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.tile_matmul import group_tokens, grouped_linear, ternary_ffn
from trix.nn.ternary_weight import TernaryWeight


class TernaryTiles(nn.Module):
    """y[t] = sum_k weight[t, k] * down_e relu(up_e x[t])^2 with e = tile_idx[t, k].

    Squared ReLU: So et al., 2021, "Primer" (arXiv:2109.08668).

    Shape:
        x_TD float, tile_idx_TK int64, weight_TK float -> [T, D], in the dtype of x.

    ``skip_unused``: assignments of weight 0 are not multiplied, forward or backward; they cost only their share of the sort and
    of the [T * K, D] buffers. In torch the packed form computes them like any other; exported it leaves them out.
    """

    def __init__(self, d_model: int, num_tiles: int, tile_width: int) -> None:
        super().__init__()
        self.up = TernaryWeight(num_tiles, tile_width, d_model)
        self.down = TernaryWeight(num_tiles, d_model, tile_width)

    def votes(self) -> Tensor:
        """What each tile's up rows respond to: [E, D], their codes' column sums, see :meth:`TernaryWeight.votes`."""
        return self.up.votes()

    def forward(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor, skip_unused: bool = False) -> Tensor:
        if self.up.is_packed:
            return self._packed(x_TD, tile_idx_TK, weight_TK)
        top_k, num_tiles = tile_idx_TK.shape[1], self.up.shape[0]
        tile_idx_S = tile_idx_TK.reshape(-1)  # S = T * K assignments
        if skip_unused:  # sorted behind all tiles, as the rest that belongs to no group
            tile_idx_S = torch.where(weight_TK.reshape(-1) == 0, num_tiles, tile_idx_S)
        groups = group_tokens(tile_idx_S, num_tiles)
        x_SD = x_TD[groups.order if top_k == 1 else groups.order // top_k]
        hidden_SH = F.relu(grouped_linear(x_SD, self.up.ternary(), groups.ends, skip_unused)).square()
        y_SD = grouped_linear(hidden_SH, self.down.ternary(), groups.ends, skip_unused)[groups.inverse]
        y_TKD = y_SD.reshape(*tile_idx_TK.shape, x_TD.shape[-1]) * weight_TK.unsqueeze(-1).to(y_SD.dtype)
        return y_TKD.sum(dim=1)

    def _packed(self, x_TD: Tensor, tile_idx_TK: Tensor, weight_TK: Tensor) -> Tensor:
        up, down = self.up, self.down
        assert up.packed is not None
        assert up.row_scale is not None
        assert down.packed is not None
        assert down.row_scale is not None
        return ternary_ffn(x_TD, tile_idx_TK, weight_TK, up.packed, up.row_scale, down.packed, down.row_scale)
