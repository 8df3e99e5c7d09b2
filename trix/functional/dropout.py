"""Dropout's factors from 16 random bits each."""

import torch
from torch import Tensor


def dropout_factors(shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """0 with probability P = round(65536 p) / 65536, else 1 / (1 - P): float32 of the given shape, of mean 1.

    On a CPU torch's own dropout draws one number of 53 bits for each element, which takes longer than all else that a sparse
    lookup does with it; here a draw of 64 bits serves four.

    Raises:
        ValueError: p outside [0, 1].
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p ({p}) must be >= 0 and <= 1")
    num_dropped = round(p * 2**16)  # of the 2^16 values that 16 bits have
    if num_dropped == 2**16:
        return torch.zeros(shape, device=device)
    num_draws = -(-shape.numel() // 4)
    bits = torch.empty(num_draws, dtype=torch.int64, device=device).random_(-(2**63), None)
    value = bits.view(torch.int16)[: shape.numel()].reshape(shape).to(torch.float32)
    return value.ge_(num_dropped - 2**15).mul_(2**16 / (2**16 - num_dropped))
