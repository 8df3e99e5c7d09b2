"""A linear layer of BitNet: ternary weights that were trained elsewhere, activations of 8 bits."""

import torch
from torch import Tensor

from trix.functional.packing import pack_ternary
from trix.functional.tile_matmul import in_8bit_steps, ternary_tile_matmul_8bit
from trix.nn.ternary_weight import TernaryWeight

MIN_MAGNITUDE = 1e-5
NEAR_TIE = 1e-4  # in steps: values reach 127, where float32 sums may differ in their last bits


class BitLinear(TernaryWeight):
    """y = scale * code q * (m / 127) + b with m = max(max |x|, 1e-5) of each token and q = round(x * (127 / m)).

    As BitLinear of transformers computes in float32 (arXiv:2402.17764, section 2). It is for inference alone, and always
    packed: :meth:`unpack` does nothing, as float weights behind the codes are not known.

    Args:
        code_NK: [N, K] in {-1, 0, +1}. scale: a float32 of all rows, or [N]. bias: [N].

    Shape:
        x: float [..., K] -> [..., N], in the dtype of x.

    Raises:
        ValueError: another code.
    """

    def __init__(self, code_NK: Tensor, scale: Tensor, bias: Tensor | None = None) -> None:
        super().__init__(*code_NK.shape)
        self.weight = None
        self.packed, self.row_scale = pack_ternary(code_NK), scale.expand(code_NK.shape[0]).clone()
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        assert self.packed is not None
        assert self.row_scale is not None
        x_TK = x.reshape(-1, x.shape[-1])
        only_tile_T = torch.zeros(x_TK.shape[0], dtype=torch.int64, device=x.device)
        y_TN = ternary_tile_matmul_8bit(x_TK, self.packed[None], self.row_scale[None], only_tile_T, MIN_MAGNITUDE)
        y = y_TN.reshape(*x.shape[:-1], y_TN.shape[-1])
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def num_near_ties(self, x: Tensor) -> int:
        """Values so close to halfway between two steps that the order of earlier float sums can decide the rounding."""
        steps, _ = in_8bit_steps(x, MIN_MAGNITUDE)
        return int(((steps - steps.floor() - 0.5).abs() <= NEAR_TIE).sum())

    def unpack(self) -> None:
        """Nothing: there is no other form."""
