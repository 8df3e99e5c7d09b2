"""Which ensemble of random matrices the gaps between eigenvalues look like: GUE, GOE, Poisson, or none of them."""

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import stats

TRIM = 0.1  # of the eigenvalues at either end, where the density falls too fast to be unfolded
HALF_WINDOW = 15  # spacings to either side that the local mean is taken over
FAR = 0.05  # a Kolmogorov-Smirnov distance that says "none of them"; GUE and GOE are 0.068 apart
CRITICAL = 1.63  # over sqrt(n): the distance that n draws of the very distribution exceed once in 100

# Spacings of mean 1. Those of GUE and GOE are Wigner's surmises, which are exact for matrices of two rows and close for larger.
ENSEMBLES = {
    "gue": stats.maxwell(scale=np.sqrt(np.pi / 8)),  # 32 s^2 / pi^2 exp(-4 s^2 / pi)
    "goe": stats.rayleigh(scale=np.sqrt(2 / np.pi)),  # pi s / 2 exp(-pi s^2 / 4)
    "poisson": stats.expon(),  # exp(-s)
}


class SpacingStatistics(NamedTuple):
    """How the gaps between neighbouring eigenvalues are distributed.

    mean_gap_ratio: mean of min(s, s') / max(s, s') over neighbouring gaps: .600 for GUE, .531 for GOE, .386 for Poisson (Atas
    et al., 2013, arXiv:1212.5611), 1 for equal gaps. ks_*: Kolmogorov-Smirnov distance of the unfolded spacings to each.
    num_spacings: how many unfolded spacings were compared. closest: the ensemble of the smallest distance, or "none" where even
    that exceeds max(0.05, 1.63 / sqrt(num_spacings)).
    """

    mean_gap_ratio: float
    ks_gue: float
    ks_goe: float
    ks_poisson: float
    num_spacings: int
    closest: Literal["gue", "goe", "poisson", "none"]


def unfolded_spacings(eigenvalues: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The gaps of the middle 80 % of a spectrum in units of the mean gap around each: float64 [n].

    The mean is that of 31 gaps, the one in question in the middle. Local means unfold any density that changes slowly: a picket
    fence whose gaps change slowly becomes one of equal gaps.

    Args:
        eigenvalues: [N] of one matrix, in any order, or [R, N] of R matrices, whose spacings are pooled.

    Raises:
        ValueError: another number of dimensions, a value that is not finite, too few eigenvalues, or 31 equal ones.
    """
    spacings = []
    for kept in _middle(eigenvalues):
        gaps = np.diff(kept)
        mean = np.convolve(gaps, np.full(2 * HALF_WINDOW + 1, 1 / (2 * HALF_WINDOW + 1)), mode="valid")
        if mean.min() <= 0:
            raise ValueError(f"the mean gap around an eigenvalue ({mean.min()}) must be > 0")
        spacings.append(gaps[HALF_WINDOW:-HALF_WINDOW] / mean)
    return np.concatenate(spacings)


def spacing_statistics(eigenvalues: npt.ArrayLike) -> SpacingStatistics:
    """:class:`SpacingStatistics` of the spectra, with scipy's Kolmogorov-Smirnov distance.

    Measured: of 2000 spacings, a GUE matrix, the tridiagonal beta = 2 ensemble (Dumitriu and Edelman, 2002), and Anderson
    disorder of width 4 are told apart with distances below 0.03; a free Laplacian is "none".

    Args and Raises: as :func:`unfolded_spacings`.
    """
    ratios = [np.minimum(gaps[1:], gaps[:-1]) / np.maximum(gaps[1:], gaps[:-1]) for gaps in map(np.diff, _middle(eigenvalues))]
    spacing = unfolded_spacings(eigenvalues)
    distance = {name: float(stats.kstest(spacing, ensemble.cdf).statistic) for name, ensemble in ENSEMBLES.items()}
    closest = min(distance, key=distance.__getitem__)
    if distance[closest] > max(FAR, CRITICAL / np.sqrt(len(spacing))):
        closest = "none"
    mean_ratio = float(np.nanmean(np.concatenate(ratios)))  # NaN between two gaps of 0
    return SpacingStatistics(mean_ratio, distance["gue"], distance["goe"], distance["poisson"], len(spacing), closest)  # type: ignore[arg-type]


def _middle(eigenvalues: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The sorted eigenvalues of each spectrum without the ends: [R, n]."""
    spectra = np.sort(np.asarray(eigenvalues, dtype=np.float64), axis=-1)
    if spectra.ndim not in (1, 2):
        raise ValueError(f"eigenvalues {spectra.shape} must be [N] or [R, N]")
    if not np.isfinite(spectra).all():
        raise ValueError(f"eigenvalues ({spectra[~np.isfinite(spectra)][0]}) must be finite")
    num_trimmed = int(TRIM * spectra.shape[-1])
    kept = np.atleast_2d(spectra)[:, num_trimmed : spectra.shape[-1] - num_trimmed]
    if kept.shape[-1] < 2 * HALF_WINDOW + 2:
        raise ValueError(f"eigenvalues without the ends ({kept.shape[-1]}) must be >= {2 * HALF_WINDOW + 2}")
    return kept
