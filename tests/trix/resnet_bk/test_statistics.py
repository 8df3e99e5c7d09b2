"""The check of spacings must come out right on spectra whose answer is known, each with at least 2000 spacings."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.linalg import eigh_tridiagonal, eigvalsh

from trix.resnet_bk.statistics import ENSEMBLES, spacing_statistics, unfolded_spacings

N = 2600
Spectrum = Callable[[np.random.Generator], np.ndarray]


def gaussian_matrices(rng: np.random.Generator, is_complex: bool) -> np.ndarray:
    spectra = []
    for _ in range(6):
        a = rng.standard_normal((500, 500)) + (1j * rng.standard_normal((500, 500)) if is_complex else 0.0)
        spectra.append(eigvalsh(a + a.conj().T))
    return np.stack(spectra)


def dumitriu_edelman(rng: np.random.Generator, beta: int) -> np.ndarray:
    off_diagonal = np.sqrt(rng.chisquare(beta * np.arange(N - 1, 0, -1)) / 2)
    return eigh_tridiagonal(rng.standard_normal(N), off_diagonal, eigvals_only=True)


def lattice(potential: np.ndarray) -> np.ndarray:
    return eigh_tridiagonal(potential, np.ones(len(potential) - 1), eigvals_only=True)


CONTROLS: dict[str, tuple[Spectrum, str, float]] = {
    "GUE": (lambda rng: gaussian_matrices(rng, is_complex=True), "gue", 0.600),
    "GOE": (lambda rng: gaussian_matrices(rng, is_complex=False), "goe", 0.531),
    "tridiagonal, beta 2": (lambda rng: dumitriu_edelman(rng, 2), "gue", 0.600),
    "tridiagonal, beta 1": (lambda rng: dumitriu_edelman(rng, 1), "goe", 0.531),
    "Anderson, W = 4": (lambda rng: lattice(rng.uniform(-2, 2, N)), "poisson", 0.386),
    "free Laplacian": (lambda _: lattice(np.zeros(N)), "none", 1.0),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_controls_come_out_right(name: str) -> None:
    make, closest, gap_ratio = CONTROLS[name]
    found = spacing_statistics(make(np.random.default_rng(0)))
    assert found.num_spacings >= 2000
    assert found.closest == closest
    assert found.mean_gap_ratio == pytest.approx(gap_ratio, abs=0.02)
    distances = {"gue": found.ks_gue, "goe": found.ks_goe, "poisson": found.ks_poisson}
    if closest == "none":
        assert min(distances.values()) > 0.4
    else:
        assert distances[closest] < 0.03


@pytest.mark.parametrize("name", ENSEMBLES)
def test_draws_of_an_ensemble_are_closest_to_it_and_their_mean_is_1(name: str) -> None:
    ensemble = ENSEMBLES[name]
    assert ensemble.mean() == pytest.approx(1.0)
    found = spacing_statistics(ensemble.rvs(4000, random_state=0).cumsum())
    assert found.closest == name


def test_the_density_is_unfolded_away_and_neither_shift_nor_scale_matters() -> None:
    level = np.random.default_rng(0).exponential(size=4000).cumsum()
    stretched = np.exp(level / 2000)  # the density falls by e^2
    np.testing.assert_allclose(unfolded_spacings(stretched), unfolded_spacings(level), rtol=0.05, atol=0.02)
    np.testing.assert_allclose(unfolded_spacings(3 * level - 7), unfolded_spacings(level), rtol=1e-9)


def test_several_spectra_are_pooled_and_not_joined() -> None:
    spectra = np.random.default_rng(0).exponential(size=(3, 100)).cumsum(axis=1)
    expected = np.concatenate([unfolded_spacings(row) for row in spectra])
    np.testing.assert_array_equal(unfolded_spacings(spectra), expected)


def test_a_few_spacings_of_an_ensemble_are_not_called_none() -> None:
    names = [spacing_statistics(ENSEMBLES["goe"].rvs(120, random_state=seed).cumsum()).closest for seed in range(50)]
    assert names.count("none") <= 2


@pytest.mark.parametrize(
    ("eigenvalues", "message"),
    [
        (np.zeros((2, 2, 2)), r"eigenvalues \(2, 2, 2\) must be \[N\] or \[R, N\]"),
        (np.array([0.0, np.nan]), r"eigenvalues \(nan\) must be finite"),
        (np.arange(30.0), r"eigenvalues without the ends \(24\) must be >= 32"),
        (np.zeros(100), r"the mean gap around an eigenvalue \(0.0\) must be > 0"),
    ],
)
def test_what_cannot_be_unfolded_is_refused(eigenvalues: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unfolded_spacings(eigenvalues)
