"""The dense control of a feed-forward layer."""

import torch.nn.functional as F
from torch import Tensor, nn


class DenseFFN(nn.Module):
    """The dense control: y = W_down relu(W_up x)^2 with float weights. x: float [..., D] -> [..., D]."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())
