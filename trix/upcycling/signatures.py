"""Signatures that send each token to the tiles which its layer needs most.

Legend: T tokens, D model width, E tiles.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trix.functional.signatures import signature_scores
from trix.functional.ternary import threshold_ternary
from trix.routing.router import SIGNATURE_THRESHOLD

STEPS, BATCH, LEARNING_RATE = 300, 2048, 0.03


class Signatures(NamedTuple):
    """signature_ED: in {-1, 0, +1}. bias_E: what is added to the scores."""

    signature_ED: Tensor
    bias_E: Tensor


def best_tiles(y_TED: Tensor, top_k: int) -> Tensor:
    """The top_k tiles per token whose sum is nearest to the sum of all, nearly: bool [T, E].

    One tile after another is left out, each time the one which adds least to the squared error |sum of those left out|^2. That
    is not always the best choice of top_k tiles, which would have to be searched among all.

    Args:
        y_TED: what each tile adds to the output.
    """
    num_tokens, num_tiles, _ = y_TED.shape
    row_T = torch.arange(num_tokens)
    product_TEE = y_TED @ y_TED.mT
    added_TE = product_TEE.diagonal(dim1=1, dim2=2).clone()
    is_left_out_TE = torch.zeros(num_tokens, num_tiles, dtype=torch.bool)
    for _ in range(num_tiles - top_k):
        least_T = added_TE.masked_fill(is_left_out_TE, torch.inf).argmin(dim=1)
        is_left_out_TE[row_T, least_T] = True
        added_TE += 2 * product_TEE[row_T, :, least_T]
    return ~is_left_out_TE


def fit_signatures(x_TD: Tensor, is_best_TE: Tensor, seed: int = 0) -> Signatures:
    """Ternary signatures and biases by which sigmoid(a (score[t, e] + bias[e])) predicts is_best[t, e].

    They begin at the signs of the difference between the mean token for which a tile is among the best and the mean of the
    others, and take 300 steps of Adam on the binary cross entropy, through the threshold of the router and its straight-through
    gradient. The positive number a, which orders nothing, is learned with them.

    Of the other ways that were tried, the signs of that difference alone, emergent signatures and linear discriminants lose
    more of the layer's output, as does the cross entropy of a softmax over the tiles.
    """
    generator = torch.Generator().manual_seed(seed)
    is_best_TE = is_best_TE.to(x_TD.dtype)
    count_E = is_best_TE.sum(dim=0).unsqueeze(1)
    sum_ED = is_best_TE.T @ x_TD
    difference_ED = sum_ED / count_E.clamp_min(1) - (x_TD.sum(dim=0) - sum_ED) / (len(x_TD) - count_E).clamp_min(1)
    is_large_ED = difference_ED.abs() > difference_ED.abs().mean(dim=1, keepdim=True)
    raw_ED = (0.5 * difference_ED.sign() * is_large_ED).requires_grad_()
    bias_E = torch.zeros(len(raw_ED), dtype=raw_ED.dtype, requires_grad=True)
    log_slope = torch.zeros((), dtype=raw_ED.dtype, requires_grad=True)
    optimizer = torch.optim.Adam([raw_ED, bias_E, log_slope], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for _ in range(STEPS):
            row_B = torch.randint(len(x_TD), (BATCH,), generator=generator)
            score_BE = signature_scores(x_TD[row_B], threshold_ternary(raw_ED, SIGNATURE_THRESHOLD))
            loss = F.binary_cross_entropy_with_logits((score_BE + bias_E) * log_slope.exp(), is_best_TE[row_B])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return Signatures(threshold_ternary(raw_ED.detach(), SIGNATURE_THRESHOLD), bias_E.detach())
