"""How tokens are spread over tiles, counted over a whole evaluation."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class RoutingStatistics(Metric):
    """The counts of :meth:`trix.nn.TriXFFN.get_routing_stats` over many batches; summed over ranks by torchmetrics.

    Args:
        num_tiles: E.
    """

    full_state_update = False
    count_E: Tensor
    gap_sum: Tensor
    num_tokens: Tensor

    def __init__(self, num_tiles: int) -> None:
        super().__init__()
        self.num_tiles = num_tiles
        self.add_state("count_E", torch.zeros(num_tiles, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("gap_sum", torch.zeros((), dtype=torch.float32), dist_reduce_fx="sum")
        self.add_state("num_tokens", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, tile_idx: Tensor, weight: Tensor, scores: Tensor) -> None:
        """Take a batch into account: tile_idx int64 and weight float [..., K], scores float [..., E].

        An assignment of weight 0 (adaptive k) is none.
        """
        self.count_E += torch.bincount(tile_idx[weight != 0], minlength=self.num_tiles)
        best = scores.reshape(-1, self.num_tiles).float().topk(min(2, self.num_tiles), dim=-1).values
        self.gap_sum += (best[:, 0] - best[:, -1]).sum()
        self.num_tokens += len(best)

    def compute(self) -> dict[str, Tensor]:
        """Scalars, but for the first two:

        count: assignments per tile, int64 [E]. usage: their shares, float32 [E]. balance: min / max of usage.
        max_over_mean_load: 1 is even, E is collapse. entropy_nats: of usage. relative_entropy: entropy / log E (1 with one
        tile). confidence: mean gap between the best two scores (0 with one tile). mean_k: assignments per token.
        """
        usage_E = self.count_E.float() / self.count_E.sum().clamp_min(1)
        entropy = torch.special.entr(usage_E).sum()
        highest = usage_E.amax().clamp_min(torch.finfo(usage_E.dtype).tiny)
        one_tile = self.num_tiles == 1
        return {
            "count": self.count_E.clone(),
            "usage": usage_E,
            "balance": usage_E.amin() / highest,
            "max_over_mean_load": usage_E.amax() * self.num_tiles,
            "entropy_nats": entropy,
            "relative_entropy": torch.ones_like(entropy) if one_tile else entropy / math.log(self.num_tiles),
            "confidence": self.gap_sum / self.num_tokens.clamp_min(1),
            "mean_k": self.count_E.sum().float() / self.num_tokens.clamp_min(1),
        }
