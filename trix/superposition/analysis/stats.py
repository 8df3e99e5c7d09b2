"""Means per document, outliers of a map, and how a latent is active.

Legend: N tokens, P documents, K latents.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

CHUNK_TOKENS = 16384  # widened to float64 at once
# Borders of the bins of a histogram of log10 densities; the first bin is that of latents that never fire.
DENSITY_BORDERS = np.linspace(-7.0, 0.0, 29)


def mean_pool_by_title(z: npt.ArrayLike | Tensor, title_idx: npt.ArrayLike | Tensor) -> npt.NDArray[np.float32]:
    """The mean of the rows of each document, float32 [P, K]; sums run in float64, one pass over the tokens.

    Row p is that of the p-th smallest document number: ``np.unique(title_idx)[p]``. Documents without tokens have no row.

    Args:
        z: latents [N, K], or any other rows of tokens.
        title_idx: document of each token, int [N], in any order.

    Raises:
        ValueError: shapes that do not fit.
    """
    z_NK, title_N = torch.as_tensor(z).detach().cpu(), torch.as_tensor(title_idx).cpu()
    if z_NK.ndim != 2 or title_N.shape != z_NK.shape[:1]:
        raise ValueError(f"z {tuple(z_NK.shape)} must be [N, K] and title_idx {tuple(title_N.shape)} [N]")
    titles, document_N, count_P = torch.unique(title_N, return_inverse=True, return_counts=True)
    sum_PK = torch.zeros(len(titles), z_NK.shape[1], dtype=torch.float64)
    for rows_NK, document in zip(torch.split(z_NK, CHUNK_TOKENS), torch.split(document_N, CHUNK_TOKENS), strict=True):
        sum_PK.index_add_(0, document, rows_NK.double())
    mean_PK: npt.NDArray[np.float32] = (sum_PK / count_P[:, None]).float().numpy()
    return mean_PK


def trim_outliers(X2: npt.ArrayLike, p: float = 99.0) -> npt.NDArray[np.bool_]:
    """Which points to keep, bool [N]: those at most as far from the median point as the p-th percentile of the distances.

    A mask, so that labels can be cut to the same points: ``X2[mask], y[mask]``.

    Args:
        X2: points [N, C].
        p: percentile, > 0 and <= 100.

    Raises:
        ValueError: p out of range, or no points [N, C].
    """
    if not 0 < p <= 100:
        raise ValueError(f"p ({p}) must be > 0 and <= 100")
    points_NC = np.asarray(X2, dtype=np.float64)
    if points_NC.ndim != 2:
        raise ValueError(f"X2 {points_NC.shape} must be [N, C]")
    if len(points_NC) == 0:
        return np.zeros(0, dtype=bool)
    distance_N = np.linalg.norm(points_NC - np.median(points_NC, axis=0), axis=1)
    is_kept_N: npt.NDArray[np.bool_] = distance_N <= np.percentile(distance_N, p)
    return is_kept_N


def compute_activation_stats(z_vals: npt.ArrayLike | Tensor, min_activation: float = 0.0) -> dict[str, float]:
    """How often and how strongly a latent is active, from its activation on each token.

    num_tokens; num_active: those with an activation > min_activation; density: their share; mean, std, median, min and max of
    the active values (std of the population). All are 0 for a latent that never fires, and for no tokens.

    Args:
        z_vals: activations of one latent, of any shape.

    Raises:
        ValueError: an activation that is not finite.
    """
    z_N = torch.as_tensor(z_vals).detach().cpu().double().flatten().numpy()
    if not np.isfinite(z_N).all():
        raise ValueError(f"activations ({np.count_nonzero(~np.isfinite(z_N))} that are not) must be finite")
    active = z_N[z_N > min_activation]
    counts = {
        "num_tokens": len(z_N),
        "num_active": len(active),
        "density": len(active) / len(z_N) if len(z_N) else 0.0,
    }
    if len(active) == 0:
        return counts | dict.fromkeys(("mean", "std", "median", "min", "max"), 0.0)
    values = {name: float(getattr(np, name)(active)) for name in ("mean", "std", "median", "min", "max")}
    return counts | values


def log_densities(density_K: npt.ArrayLike | Tensor) -> npt.NDArray[np.float64]:
    """log10 of the share of tokens at which each latent is active, float64 [K], inside DENSITY_BORDERS.

    A latent that never fires is put into the first bin, at -7; one that does is put into the second at least, so that the first
    holds no others.

    Args:
        density_K: shares in [0, 1].
    """
    density_K = torch.as_tensor(density_K).detach().cpu().double().numpy()
    log_K = np.log10(np.where(density_K > 0, density_K, 1.0)).clip(min=DENSITY_BORDERS[1])
    return np.where(density_K > 0, log_K, DENSITY_BORDERS[0])
