"""How much each chosen tile counts, by the scores of a token.

Legend: T tokens, E tiles, K tiles per token.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor


class Gate(IntEnum):
    """The gates, with their codes in the operator SignatureRoute."""

    SIGMOID = 0
    SOFTMAX = 1
    ADAPTIVE = 2


def softmax_weight(score_TE: Tensor, tile_idx_TK: Tensor, log_mass_E: Tensor) -> Tensor:
    """weight[t, k] = exp(score[t, e]) / sum_f exp(log_mass_f + score[t, f]) * sqrt(E) with e = tile_idx[t, k]: float [T, K]."""
    share_TK = (score_TE + log_mass_E).softmax(dim=-1).gather(-1, tile_idx_TK)
    return share_TK * math.sqrt(score_TE.shape[-1]) * log_mass_E.neg().exp()[tile_idx_TK]


def adaptive_k(score_TE: Tensor, confidence_threshold: float, max_k: int) -> Tensor:
    """k[t] = the number of tiles whose score is within confidence_threshold of the best one, at most max_k: int64 [T].

    So k = 1 where the confidence exceeds the threshold, else 2, and more only where more scores are that close. The scores are
    agreements per active dimension (see :func:`~trix.functional.signatures.signature_scores`), so a threshold means the same
    at every width.
    """
    is_close_TE = score_TE.amax(dim=-1, keepdim=True) - score_TE <= confidence_threshold
    return is_close_TE.sum(dim=-1).clamp(1, max_k)


def adaptive_weight(score_TE: Tensor, tile_idx_TK: Tensor, confidence_threshold: float) -> Tensor:
    """The softmax over the first k[t] of the K chosen tiles, k from :func:`adaptive_k`, and exactly 0 for the others.

    Args:
        score_TE: float [T, E]. tile_idx_TK: int64 [T, K], best first.

    Returns:
        float [T, K]; sums to 1 over K.
    """
    max_k = tile_idx_TK.shape[-1]
    k_T = adaptive_k(score_TE.detach(), confidence_threshold, max_k)
    is_unused_TK = torch.arange(max_k, device=k_T.device) >= k_T.unsqueeze(-1)
    return score_TE.gather(-1, tile_idx_TK).masked_fill(is_unused_TK, -torch.inf).softmax(dim=-1)
