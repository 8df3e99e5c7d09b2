"""Adaptive computation time: each token decides after which block its own computation ends."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

PONDER_WEIGHT = 0.01


class Halted(NamedTuple):
    """What is known after some blocks.

    mean_BTD: sum of weight times stream. spent_BT: sum of p. is_running_BT: bool. steps_BT: blocks computed. remainder_BT: the
    last weight of a token that has halted, 0 for one that is still running.
    """

    mean_BTD: Tensor
    spent_BT: Tensor
    is_running_BT: Tensor
    steps_BT: Tensor
    remainder_BT: Tensor


class Halting(nn.Module):
    """After block l a token has spent sum p_l, p = sigmoid(w . x + b); at 1 - threshold, or after the last block, it halts.

    Its answer is sum p_l x_l, with what was left to 1 as the last weight. From then on its stream stays: later tokens still mix
    with it, and no tile computes it. ponder = steps + remainder, whose mean times 0.01 is added to the losses.

    Per token, so causal and without effect on other rows of a batch.

    Source: Graves, 2016 (arXiv:1603.08983), over blocks instead of the steps of a recurrent cell.

    Args:
        d_model: width. threshold: in (0, 1): a token halts once less than this is left.

    Raises:
        ValueError: threshold outside (0, 1).
    """

    def __init__(self, d_model: int, threshold: float) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"halting threshold ({threshold}) must be > 0 and < 1")
        self.threshold = threshold
        self.halt = nn.Linear(d_model, 1)
        nn.init.constant_(self.halt.bias, -1.0)  # at first a token computes several blocks

    def start(self, x_BTD: Tensor) -> Halted:
        zero_BT = torch.zeros_like(x_BTD[..., 0])
        return Halted(torch.zeros_like(x_BTD), zero_BT, torch.ones_like(zero_BT, dtype=torch.bool), zero_BT, zero_BT)

    def step(self, x_BTD: Tensor, so_far: Halted, is_last: bool) -> Halted:
        """After a block, with its stream."""
        p_BT = torch.sigmoid(self.halt(x_BTD).squeeze(-1)).to(x_BTD.dtype)
        is_running_BT = so_far.is_running_BT
        halts_BT = is_running_BT if is_last else is_running_BT & (so_far.spent_BT + p_BT >= 1.0 - self.threshold)
        left_BT = 1.0 - so_far.spent_BT
        weight_BT = torch.where(halts_BT, left_BT, p_BT) * is_running_BT
        return Halted(
            so_far.mean_BTD + weight_BT.unsqueeze(-1) * x_BTD,
            so_far.spent_BT + weight_BT,
            is_running_BT & ~halts_BT,
            so_far.steps_BT + is_running_BT,
            torch.where(halts_BT, left_BT, so_far.remainder_BT),
        )

    def ponder(self, halted: Halted, mask_BT: Tensor | None) -> Tensor:
        """The weighted ponder cost, a scalar: the mean over the tokens that are not padding."""
        cost_BT = halted.steps_BT + halted.remainder_BT
        if mask_BT is None:
            return PONDER_WEIGHT * cost_BT.mean()
        return PONDER_WEIGHT * (cost_BT * mask_BT).sum() / mask_BT.sum().clamp_min(1)
