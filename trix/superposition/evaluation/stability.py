"""Whether two trainings find the same features.

Shapes: K latents, O width of what is written, M matched pairs.
"""

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

SAME_COSINE = 0.7
MAX_MATCHED = 4096  # rows; matching takes time with the cube of their number


class Stability(NamedTuple):
    """How alike the rows of two decoders are, one row matched with one.

    shared: share of the pairs with a cosine above SAME_COSINE. mean_cosine: of the pairs. mean_max_cosine: mean over the rows
    of the first of the largest cosine with any row of the second. num_rows: M.
    """

    shared: float
    mean_cosine: float
    mean_max_cosine: float
    num_rows: int


def stability(first_KO: Tensor, second_KO: Tensor) -> Stability:
    """The pairs have the largest sum of cosines that one-to-one pairs can have (Hungarian method).

    Of more than MAX_MATCHED rows of the first, evenly spaced ones are matched with all of the second.

    Args:
        first_KO, second_KO: decoder rows, of the same shape.

    Raises:
        ValueError: another shape.
    """
    if first_KO.shape != second_KO.shape or first_KO.ndim != 2:
        raise ValueError(f"decoders ({list(first_KO.shape)} and {list(second_KO.shape)}) must be [K, O], both of one shape")
    if len(first_KO) > MAX_MATCHED:
        first_KO = first_KO[torch.linspace(0, len(first_KO) - 1, MAX_MATCHED).long()]
    first_KO, second_KO = (torch.nn.functional.normalize(row.detach().float(), dim=-1) for row in (first_KO, second_KO))
    cosine_MK = first_KO @ second_KO.t()
    rows, columns = linear_sum_assignment(cosine_MK.numpy(), maximize=True)
    matched_M = cosine_MK[rows, columns].double()
    return Stability(
        shared=float((matched_M > SAME_COSINE).double().mean()),
        mean_cosine=float(matched_M.mean()),
        mean_max_cosine=float(cosine_MK.amax(dim=1).double().mean()),
        num_rows=len(matched_M),
    )


def random_stability(like_KO: Tensor, other_KO: Tensor | None = None, seed: int = 0) -> Stability:
    """The same of random rows, with a normal distribution: what no training at all finds again.

    Args:
        like_KO: the shape. other_KO: rows to compare them with, by default other random ones.
    """
    generator = torch.Generator().manual_seed(seed)
    first_KO = torch.randn(like_KO.shape, generator=generator)
    return stability(first_KO if other_KO is None else other_KO, torch.randn(like_KO.shape, generator=generator))
