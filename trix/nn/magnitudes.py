"""How strongly a tile answers: functions of a point in the plane [-1, 1]^2, one for each tile, all tiles in one tensor.

Both read only the parameters of the tiles that the tokens chose, so the cost of a token does not depend on the number of tiles.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.lookup import grid_rows, hinge_rows
from trix.functional.ternary import absmean_ternary


class GridSplines(nn.Module):
    """Bilinear splines on a grid of grid_size x grid_size cells: m[t] interpolates the four corners of the cell of p[t].

    Corner values are float, or ternary with one scale for each tile (absmean, straight-through gradient).

    Args:
        num_tiles, grid_size: E, and the cells along each side. is_ternary: see above.

    Shape:
        point_T2: float in [-1, 1], tile_idx_T int64 -> magnitude [T], in the promoted dtype of points and parameters.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_tiles: int, grid_size: int = 16, is_ternary: bool = True) -> None:
        super().__init__()
        _check_sizes(num_tiles, grid_size)
        self.grid_size, self.is_ternary = grid_size, is_ternary
        self.corner_EV = nn.Parameter(torch.randn(num_tiles, (grid_size + 1) ** 2))  # V corners, row by row

    def values(self) -> Tensor:
        """The corner values in force: [E, V]."""
        return absmean_ternary(self.corner_EV) if self.is_ternary else self.corner_EV

    def forward(self, point_T2: Tensor, tile_idx_T: Tensor) -> Tensor:
        return grid_rows(point_T2, self.values(), tile_idx_T, self.grid_size)

    def extra_repr(self) -> str:
        return f"num_tiles={self.corner_EV.shape[0]}, grid_size={self.grid_size}, is_ternary={self.is_ternary}"


class HingeSplines(nn.Module):
    """A perceptron 2 -> grid_size -> 1 for each tile: m[t] = base_e + sum_g height_eg relu(<slope_eg, p[t]> + offset_eg).

    That is a piecewise linear function whose creases are grid_size lines, drawn so that they cross the plane [-1, 1]^2.

    Shape:
        point_T2: float in [-1, 1], tile_idx_T int64 -> magnitude [T], in the promoted dtype of points and parameters.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, num_tiles: int, grid_size: int = 16) -> None:
        super().__init__()
        _check_sizes(num_tiles, grid_size)
        self.grid_size = grid_size
        self.slope_EGI = nn.Parameter(F.normalize(torch.randn(num_tiles, grid_size, 2), dim=-1))
        self.offset_EG = nn.Parameter(torch.empty(num_tiles, grid_size).uniform_(-1.0, 1.0))
        self.height_EG = nn.Parameter(torch.randn(num_tiles, grid_size) * (2.0 / grid_size) ** 0.5)
        self.base_E = nn.Parameter(torch.zeros(num_tiles))

    def values(self) -> Tensor:
        """[E, 4 G + 1]: all that a tile has, as the rows of :func:`trix.functional.lookup.hinge_rows`."""
        rows = [self.slope_EGI.mT.flatten(1), self.offset_EG, self.height_EG, self.base_E.unsqueeze(1)]
        return torch.cat(rows, dim=1)

    def forward(self, point_T2: Tensor, tile_idx_T: Tensor) -> Tensor:
        return hinge_rows(point_T2, self.values(), tile_idx_T)

    def extra_repr(self) -> str:
        return f"num_tiles={self.offset_EG.shape[0]}, grid_size={self.offset_EG.shape[1]}"


def _check_sizes(num_tiles: int, grid_size: int) -> None:
    if num_tiles < 1 or grid_size < 1:
        raise ValueError(f"num_tiles ({num_tiles}) and grid_size ({grid_size}) must be >= 1")
