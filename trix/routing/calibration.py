"""From a routing score to a gate: a curve that is learned, and cannot change who wins."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ScoreCalibrationSpline(nn.Module):
    """gate = g(sigmoid(score)), g the piecewise linear curve through (i / (n - 1), sum_{j < i} softmax(increment)_j).

    Monotone and bounded by construction: the n knots rise from 0 to 1, whatever the parameters are. So a gate never changes
    which tile has the best score. All increments start equal, where gate = sigmoid(score). The knots stand where the sigmoid
    of the score is 0, 1 / (n - 1), ..., 1: they need no range to be set, and no score falls outside of it.

    Args:
        num_knots: n.

    Shape:
        scores: float of any shape, in units that do not depend on the width (inner product / sqrt(active dimensions)) -> gates
        of the same shape in [0, 1], in at least float32.

    Raises:
        ValueError: num_knots < 2.
    """

    def __init__(self, num_knots: int = 8) -> None:
        super().__init__()
        if num_knots < 2:
            raise ValueError(f"num_knots ({num_knots}) must be >= 2")
        self.num_knots = num_knots
        self.increment = nn.Parameter(torch.zeros(num_knots - 1))

    def knots(self) -> Tensor:
        """The heights of the knots, from 0 to 1: [n]."""
        rise = self.increment.to(torch.promote_types(self.increment.dtype, torch.float32)).softmax(dim=0)
        return torch.cat([rise.new_zeros(1), rise.cumsum(dim=0)[:-1], rise.new_ones(1)])

    @property
    def knot_values(self) -> Tensor:
        """As :meth:`knots`."""
        return self.knots()

    def forward(self, scores: Tensor) -> Tensor:
        dtype = torch.promote_types(scores.dtype, torch.float32)
        rise = self.increment.to(dtype).softmax(dim=0)
        start = F.pad(rise.cumsum(dim=0)[:-1], (1, 0))
        position = scores.to(dtype).sigmoid() * (self.num_knots - 1)
        segment = position.detach().long().clamp(0, self.num_knots - 2)
        gates = start.take(segment) + rise.take(segment) * (position - segment)
        return gates.clamp_max(1.0)  # what rounding adds at the end

    def extra_repr(self) -> str:
        return f"num_knots={self.num_knots}"
