"""Codes of the last few ids."""

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.nn.fixed_code import FixedCode
from trix.outputs import StateSpec


class ContextCode(FixedCode):
    """A :class:`~trix.nn.fixed_code.FixedCode` of ids: r[t] is the row of the table at id[t], one of vocab_size.

    Shape:
        x: token_BT, int64 in [0, V).
    """

    size_name = "vocab_size"

    def __init__(self, vocab_size: int, d_model: int, num_tokens: int = 2, decay: float = 0.8) -> None:
        super().__init__(vocab_size, d_model, num_tokens, decay)

    def state_specs(self) -> tuple[StateSpec, ...]:
        """The last J - 1 ids, each plus 1; 0 where there was no token."""
        return (StateSpec("ids", ("batch", self.num_tokens - 1)),) if self.num_tokens > 1 else ()

    @property
    def state_dtype(self) -> torch.dtype:
        """float32, whatever the weights are."""
        return torch.float32

    def _masked(self, x: Tensor, mask_BT: Tensor | None) -> Tensor:
        place_BT = x + 1
        return place_BT if mask_BT is None else place_BT * mask_BT

    def _embed(self, token: Tensor, row_VD: Tensor) -> Tensor:
        return F.pad(row_VD, (0, 0, 1, 0))[token]  # row 0 is that of no token
