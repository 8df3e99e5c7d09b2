"""Pressure toward equal load, without a gate of its own."""

import torch
from torch import Tensor


def tile_load(tile_idx: Tensor, num_tiles: int) -> Tensor:
    """Share of the assignments that each tile gets: float32 [num_tiles], sums to 1 (0 for an empty batch)."""
    flat_idx = tile_idx.reshape(-1)
    ones = torch.ones_like(flat_idx, dtype=torch.float32)
    count = torch.zeros(num_tiles, device=tile_idx.device).scatter_add_(0, flat_idx, ones)
    return count / max(flat_idx.shape[0], 1)


def balance_loss(score: Tensor, tile_idx: Tensor) -> Tensor:
    """E * sum_e load_e * mean_t softmax(score_t)_e: 1 at equal load, E at collapse; differentiable through the scores.

    Source: Fedus et al., 2021, Switch Transformer (arXiv:2101.03961), eq. 4-6.

    Args:
        score: float [T, E]. tile_idx: int64 [T, K].
    """
    num_tiles = score.shape[-1]
    if score.shape[0] == 0:
        return score.sum()
    probability = score.float().softmax(dim=-1).mean(dim=0)
    return num_tiles * (tile_load(tile_idx, num_tiles) * probability).sum()


def nudged_bias(bias: Tensor, tile_idx: Tensor, rate: float) -> Tensor:
    """bias + rate * sign(mean load - load): tiles with too much load become a little harder to reach.

    Source: Wang et al., 2024, auxiliary-loss-free load balancing (arXiv:2408.15664).
    """
    load = tile_load(tile_idx, bias.shape[0])
    return bias + rate * (load.mean() - load).sign().to(bias.dtype)
