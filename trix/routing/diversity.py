"""Signatures that grow alike: three levels of intervention, as pure functions; when to call them is the caller's policy.

soft: :func:`collapsed_tiles` reports. medium: :func:`raised_weight` raises the weight of the diversity loss, and
:func:`lowered_weight` lets it fall again. hard: :func:`reseeded` draws collapsed tiles anew.
"""

import torch
from torch import Tensor

from trix.functional.signatures import pairwise_difference


def collapsed_tiles(signatures_ED: Tensor, min_difference: float = 0.05, is_frozen_E: Tensor | None = None) -> Tensor:
    """Which tiles repeat another one: bool [E].

    A tile is collapsed when its signature differs in at most a fraction ``min_difference`` of the positions from that of a tile
    with a lower index, or from a frozen one. So one tile of each group of duplicates is kept, and a frozen tile always is.

    Args:
        signatures_ED: [E, D] in {-1, 0, +1}. is_frozen_E: bool [E].

    Raises:
        ValueError: min_difference outside [0, 1).
    """
    if not 0.0 <= min_difference < 1.0:
        raise ValueError(f"min_difference ({min_difference}) must be >= 0 and < 1")
    num_tiles = signatures_ED.shape[0]
    is_frozen_E = torch.zeros(num_tiles, dtype=torch.bool, device=signatures_ED.device) if is_frozen_E is None else is_frozen_E
    # A difference is a count over D: half a position of slack keeps float32 from deciding at the limit.
    is_close_EE = pairwise_difference(signatures_ED) <= min_difference + 0.5 / signatures_ED.shape[-1]
    index = torch.arange(num_tiles, device=signatures_ED.device)
    is_kept_rather_EE = (index < index.unsqueeze(-1)) | is_frozen_E  # row: the tile judged, column: the one it may repeat
    is_other_EE = index != index.unsqueeze(-1)
    return (is_close_EE & is_kept_rather_EE & is_other_EE).any(dim=-1) & ~is_frozen_E


def raised_weight(weight: float, diversity: float, threshold: float = 0.4, growth: float = 2.0, limit: float = 1.0) -> float:
    """The next weight of the diversity loss: ``growth`` times the present one while diversity < threshold, at most ``limit``.

    A weight of 0 starts at limit / 100. From the threshold on, the weight stays: what it took to get there is still needed.

    Raises:
        ValueError: growth <= 1, limit <= 0 or weight < 0.
    """
    if growth <= 1.0 or limit <= 0.0 or weight < 0.0:
        raise ValueError(f"growth ({growth}) must be > 1, limit ({limit}) > 0 and weight ({weight}) >= 0")
    if diversity >= threshold:
        return weight
    return max(weight, min(limit, weight * growth if weight > 0.0 else limit / 100))


def lowered_weight(weight: float, least: float, growth: float = 2.0, limit: float = 1.0) -> float:
    """One step back of :func:`raised_weight`: weight / growth, and ``least`` once that is below it or below limit / 100.

    Raises:
        ValueError: growth <= 1, limit <= 0, or a negative weight.
    """
    if growth <= 1.0 or limit <= 0.0 or weight < 0.0 or least < 0.0:
        raise ValueError(f"growth ({growth}) must be > 1, limit ({limit}) > 0, weight ({weight}) and least ({least}) >= 0")
    lowered = weight / growth
    return lowered if lowered > least and lowered >= limit / 100 else min(weight, least)


def reseeded(value: Tensor, is_collapsed_E: Tensor, fresh: Tensor) -> Tensor:
    """``value`` [E, ...] with the collapsed tiles' entries taken from ``fresh`` (same shape); a new tensor."""
    is_taken = is_collapsed_E.reshape(-1, *[1] * (value.dim() - 1))
    return torch.where(is_taken, fresh.to(value.dtype), value)
