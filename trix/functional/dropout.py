"""Dropout's coin flips from 16 random bits each."""

import torch
from torch import Tensor


def dropout_mask(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """A mask of the given shape, int16, 0 with probability P = round(65536 p) / 65536, else 1; and the factor 1 / (1 - P).

    On a CPU torch's own dropout draws a number of 53 bits for each element, which takes longer than all else that a sparse
    lookup does with it; here a draw of 64 bits serves four. For P = 1 the factor is 0.

    Raises:
        ValueError: p outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p ({p}) must be >= 0 and <= 1")
    num_values = 2**16
    num_dropped = round(p * num_values)
    if num_dropped == num_values:
        return torch.zeros(shape, dtype=torch.int16, device=device), 0.0
    num_draws = -(-shape.numel() // 4)
    bits = torch.empty(num_draws, dtype=torch.int64, device=device).random_(-(2**63), None)
    mask = bits.view(torch.int16)[: shape.numel()].reshape(shape).ge_(num_dropped - num_values // 2)
    return mask, num_values / (num_values - num_dropped)
