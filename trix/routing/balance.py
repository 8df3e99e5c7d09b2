"""Pressure toward equal load, without a gate of its own."""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from trix.functional.autocast import without_autocast

MAX_LOG_RATIO = 4.0  # of the mean load to that of a tile; one without tokens counts as this
FULL_STEPS, ALL_STEPS = 100, 200  # training batches: after the first the balance bias slows down, after all it rests


def tile_load(tile_idx: Tensor, num_tiles: int, weight: Tensor | None = None) -> Tensor:
    """Share of the assignments that each tile gets: float32 [num_tiles], sums to 1 (0 for an empty batch).

    Args:
        tile_idx: int64, any shape. weight: the gate weights, same shape; assignments of weight 0 are not counted.
    """
    count = tile_count(tile_idx, num_tiles, weight)
    return count / count.sum().clamp_min(1)


def tile_count(tile_idx: Tensor, num_tiles: int, weight: Tensor | None = None) -> Tensor:
    """The assignments that each tile gets, as :func:`tile_load` counts them: float32 [num_tiles]."""
    flat_idx = tile_idx.reshape(-1)
    is_used = torch.ones_like(flat_idx, dtype=torch.float32) if weight is None else (weight.reshape(-1) != 0).float()
    return is_used.new_zeros(num_tiles).scatter_add_(0, flat_idx, is_used)


def summed_over_processes(count: Tensor) -> Tensor:
    """`count`, added up over all processes that train together, in place; every one of them has to call it."""
    if num_processes() > 1:
        torch.distributed.all_reduce(count)
    return count


def num_processes() -> int:
    """How many processes train together: 1 outside a process group."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    return 1


def mean_softmax(score: Tensor, is_counted: Tensor | None = None, num_counted: Tensor | None = None) -> Tensor:
    """mean_t softmax(score_t) of score [T, E], over the tokens that count (bool [T]; None: all): [E], in at least float32.

    Differentiable once. num_counted: divide by it in place of the number of tokens that count.
    """
    score = score.to(torch.promote_types(score.dtype, torch.float32))
    if is_counted is None:
        is_counted = torch.ones(score.shape[0], dtype=torch.bool, device=score.device)
    if num_counted is None:
        num_counted = is_counted.sum().clamp_min(1)
    share = is_counted.to(score.dtype) / num_counted
    with without_autocast(score):
        return _WeightedSoftmax.apply(score, share)  # type: ignore[no-untyped-call]


class _WeightedSoftmax(torch.autograd.Function):
    # sum_t share[t] softmax(score_t). Torch's own gradient makes three arrays of T x E, this one makes one.
    @staticmethod
    def forward(ctx: FunctionCtx, score: Tensor, share: Tensor) -> Tensor:
        probability = score.softmax(dim=-1)
        ctx.save_for_backward(share, probability)
        return share @ probability

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        share, probability = ctx.saved_tensors  # type: ignore[attr-defined]
        expected = probability @ grad
        return (grad - expected.unsqueeze(-1)).mul_(probability).mul_(share.unsqueeze(-1)), None


def balance_loss(score: Tensor, tile_idx: Tensor, weight: Tensor | None = None) -> Tensor:
    """E * sum_e load_e * mean_t softmax(score_t)_e: 1 at equal load, E at collapse; differentiable once, through
    the scores.

    Source: Fedus et al., 2021, Switch Transformer (arXiv:2101.03961), eq. 4-6.

    With several processes the load is that of all of them, and the mean is over the tokens of one, each weighted so that the
    mean of the losses (and of their gradients) is the loss of all tokens together. Every process has to call it.

    Args:
        score: float [T, E]. tile_idx: int64 [T, K]. weight: float [T, K]; assignments of weight 0 are not counted, and
            tokens without any other are not either (padding).
    """
    num_tiles = score.shape[-1]
    is_counted = (weight != 0).any(dim=-1) if weight is not None else tile_idx.new_ones(score.shape[0], dtype=torch.bool)
    # One message for both.
    count = torch.cat([tile_count(tile_idx, num_tiles, weight), is_counted.sum(dtype=torch.float32).reshape(1)])
    summed_over_processes(count)
    load, num_counted = count[:-1] / count[:-1].sum().clamp_min(1), count[-1].clamp_min(1) / num_processes()
    return num_tiles * (load * mean_softmax(score, is_counted, num_counted)).sum()


def balance_nudge(
    tile_idx: Tensor,
    num_tiles: int,
    rate: float,
    weight: Tensor | None = None,
    in_use: Tensor | None = None,
    is_by_ratio: Tensor | None = None,
) -> Tensor:
    """rate * sign(mean load - load), to be added to the bias: tiles with too much load become a little harder to reach.

    By ratio it is rate * log(mean load / load), the logarithm clipped to [-4, 4]: a tile that hardly gets a token moves far
    enough to be used before the bias rests, which equal steps do not ensure.

    Source: Wang et al., 2024, auxiliary-loss-free load balancing (arXiv:2408.15664). With several processes it is the load of
    all of them: every one has to call it.

    Args:
        tile_idx, weight: as :func:`tile_load`. in_use: bool [num_tiles]; the others have no part in the mean and get 0.
        is_by_ratio: bool, a scalar.
    """
    count = summed_over_processes(tile_count(tile_idx, num_tiles, weight))
    load = count / count.sum().clamp_min(1)
    in_use = torch.ones_like(load, dtype=torch.bool) if in_use is None else in_use
    mean = (load * in_use).sum() / in_use.sum().clamp_min(1)
    move = (mean - load).sign()
    if is_by_ratio is not None:
        smallest = torch.finfo(load.dtype).tiny  # so that an empty batch moves nothing
        log_ratio = ((mean + smallest) / (load + smallest)).log().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        move = torch.where(is_by_ratio, log_ratio, move)
    return rate * move * in_use


def step_at(age: Tensor) -> Tensor:
    """The part of ``balance_rate`` by which the bias moves: 1 for 100 training batches, 0 from 200 on, linear in between.

    A constant step never rests where inputs are few and discrete, as characters are: a tile gives up and takes back the same
    input for ever. Measured on random embeddings of characters and codes of pairs, by their frequencies in a text, with 16 and
    64 tiles (means over 10 draws): 17 to 87 % of the tokens leave their tile between updates 200 and 400, for a largest load of
    2.8 and 10.6 (characters), 1.3 and 2.4 (pairs) times the mean; with this one none, and 2.7, 9.8, 1.2, 2.3.

    Args:
        age: training batches that a tile has seen, >= 0, any shape.
    """
    return ((ALL_STEPS - age) / (ALL_STEPS - FULL_STEPS)).clamp(0.0, 1.0)


def check_weights(**weights: float) -> None:
    """Raises ValueError for a weight or rate that is negative, infinite or not a number."""
    for name, weight in weights.items():
        if not 0.0 <= weight < math.inf:
            raise ValueError(f"{name} ({weight}) must be >= 0 and finite")
