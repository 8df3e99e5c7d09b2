"""A weight that computes as {-1, 0, +1} times a row scale, in float for training or packed at 2 bits for inference."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from trix.functional.packing import check_packed, pack_ternary, packed_width, unpack_ternary
from trix.functional.signatures import signatures_from_codes
from trix.functional.ternary import absmean_codes, absmean_ternary, straight_through, weight_of_codes
from trix.functional.tile_matmul import group_tokens, grouped_linear, ternary_tile_matmul


class TernaryWeight(nn.Module):
    """Float weight [..., N, K] seen through the absmean quantiser, or its packed form.

    Float mode holds the parameter ``weight``; packed mode holds the buffers ``packed`` (uint8 [..., N, ceil(K / 4)]) and
    ``row_scale`` (the weight's dtype, [..., N]) and no float weight, so nothing can go stale and the memory is really saved. A
    state_dict of either mode loads into either: the module takes the mode of what it is given.

    Raises:
        ValueError: a shape of fewer than two dimensions, or a dimension below 1; loading packed codes that are not ternary.
    """

    weight: nn.Parameter | None
    packed: Tensor | None
    row_scale: Tensor | None

    def __init__(self, *shape: int) -> None:
        super().__init__()
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape {shape} must have at least two dimensions, each >= 1")
        self.shape = torch.Size(shape)
        self.weight = nn.Parameter(self.draw())
        self.register_buffer("packed", None)
        self.register_buffer("row_scale", None)

    def draw(self) -> Tensor:
        """Fresh initial values: [..., N, K], uniform within 1 / sqrt(K)."""
        bound = 1.0 / math.sqrt(self.shape[-1])
        return torch.empty(self.shape).uniform_(-bound, bound)

    @property
    def is_packed(self) -> bool:
        return self.weight is None

    def ternary(self) -> Tensor:
        """scale * code, [..., N, K], with a straight-through gradient in float mode."""
        if self.weight is not None:
            return absmean_ternary(self.weight)
        codes, scale = self.codes_and_scale()
        return codes * scale.unsqueeze(-1)

    def codes_and_scale(self) -> tuple[Tensor, Tensor]:
        """Codes [..., N, K] in {-1, 0, +1} (float) and row scales [..., N], without gradient."""
        if self.weight is not None:
            return absmean_codes(self.weight)
        assert self.packed is not None
        assert self.row_scale is not None
        return unpack_ternary(self.packed, self.shape[-1]).to(self.row_scale.dtype), self.row_scale

    def of_tiles(self, x_SK: Tensor, tile_idx_S: Tensor) -> Tensor:
        """y[s] = W[tile_idx[s]] x[s] for a weight [E, N, K]: [S, N], in the dtype of x.

        Packed, it is ``trix::ternary_tile_matmul``, which the exporter makes an operator of.
        """
        if self.packed is not None:
            assert self.row_scale is not None
            return ternary_tile_matmul(x_SK, self.packed, self.row_scale, tile_idx_S)
        groups = group_tokens(tile_idx_S, self.shape[0])
        return grouped_linear(x_SK[groups.order], self.ternary(), groups.ends, in_blocks=not self.training)[groups.inverse]

    def signatures(self) -> Tensor:
        """sign of the column sums of the codes: [..., K] in {-1, 0, +1}, no gradient."""
        return signatures_from_codes(self.codes_and_scale()[0])

    def votes(self) -> Tensor:
        """sum_n code[n] / sqrt(3 N): [..., K], with a gradient as of sum_n weight[n] / (scale[n] sqrt(3 N)).

        Fresh weights are uniform, and three quarters of their codes not 0: so fresh votes have standard deviation 1/2.
        """
        codes, scale = self.codes_and_scale()
        if self.weight is not None:
            codes = straight_through(codes, self.weight / scale.unsqueeze(-1))
        return codes.sum(dim=-2) / math.sqrt(3 * self.shape[-2])

    def pack(self) -> None:
        """Drop the float weight for its packed form. A second call does nothing."""
        if self.weight is None:
            return
        codes, scale = absmean_codes(self.weight)
        self.weight = None
        self.packed, self.row_scale = pack_ternary(codes), scale

    def unpack(self) -> None:
        """Return to a float weight whose ternary form is the packed one. The float values behind it are not recovered: see
        :func:`~trix.functional.ternary.weight_of_codes`.
        """
        if self.weight is not None:
            return
        codes, scale = self.codes_and_scale()
        self.packed = self.row_scale = None
        self.weight = nn.Parameter(weight_of_codes(codes, scale))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        packed, scale = state_dict.get(prefix + "packed"), state_dict.get(prefix + "row_scale")
        if packed is not None and scale is not None:
            self._become_packed(packed, scale)
        elif prefix + "weight" in state_dict and self.weight is None:
            assert self.row_scale is not None
            self.weight = nn.Parameter(self.row_scale.new_zeros(self.shape))
            self.packed = self.row_scale = None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _become_packed(self, packed: Tensor, scale: Tensor) -> None:
        expected = (*self.shape[:-1], packed_width(self.shape[-1]))
        if tuple(packed.shape) != expected or tuple(scale.shape) != expected[:-1]:
            raise ValueError(
                f"packed {tuple(packed.shape)} and row_scale {tuple(scale.shape)} must be {expected} and {expected[:-1]}"
            )
        check_packed(packed, self.shape[-1])
        present = self.weight if self.weight is not None else self.row_scale
        assert present is not None
        self.weight = None
        self.packed = torch.empty_like(packed, device=present.device)
        self.row_scale = torch.empty_like(scale, device=present.device)

    def extra_repr(self) -> str:
        return f"shape={tuple(self.shape)}, packed={self.is_packed}"
