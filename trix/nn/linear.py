"""A linear layer with ternary weights."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trix.functional.signatures import signatures_from_codes
from trix.functional.tile_matmul import ternary_tile_matmul
from trix.nn.ternary_weight import TernaryWeight


class TriXLinear(TernaryWeight):
    """y = x W^T + b with W[n, k] = scale[n] * code[n, k], code in {-1, 0, +1}.

    The output rows are cut into ``num_tiles`` equal groups, each with a signature of its own that can be read.

    Shape:
        x: float [..., in_features] -> [..., out_features], in the dtype of x (autocast's, where enabled and not packed).

    Raises:
        ValueError: out_features is not divisible by num_tiles, or a size is below 1.
    """

    def __init__(self, in_features: int, out_features: int, num_tiles: int = 4, bias: bool = False) -> None:
        if num_tiles < 1 or out_features % num_tiles:
            raise ValueError(f"out_features ({out_features}) must be divisible by num_tiles ({num_tiles}) >= 1")
        super().__init__(out_features, in_features)
        self.num_tiles = num_tiles
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def get_signature(self) -> Tensor:
        """Signature of the whole layer: [in_features] in {-1, 0, +1}."""
        return self.signatures()

    def get_tile_signatures(self) -> Tensor:
        """Signature of each group of rows: [num_tiles, in_features] in {-1, 0, +1}."""
        codes, _ = self.codes_and_scale()
        return signatures_from_codes(codes.reshape(self.num_tiles, -1, codes.shape[-1]))

    @property
    def cached_signatures(self) -> Tensor:
        """As :meth:`get_tile_signatures`; read from the weights at each call, so they are never out of date."""
        return self.get_tile_signatures()

    def forward(self, x: Tensor) -> Tensor:
        if self.packed is None:
            return F.linear(x, self.ternary(), self.bias)
        assert self.row_scale is not None
        rows = x.reshape(-1, x.shape[-1])
        only_tile = torch.zeros(rows.shape[0], dtype=torch.int64, device=x.device)
        y = ternary_tile_matmul(rows, self.packed[None], self.row_scale[None], only_tile)
        y = y.reshape(*x.shape[:-1], y.shape[-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, num_tiles={self.num_tiles}, bias={self.bias is not None}"


def projection(d_in: int, d_out: int, ternary: bool) -> nn.Module:
    """A linear map without bias, with ternary or float weights."""
    return TriXLinear(d_in, d_out, num_tiles=1) if ternary else nn.Linear(d_in, d_out, bias=False)
