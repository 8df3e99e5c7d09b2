import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trix.superposition.analysis import compute_activation_stats, mean_pool_by_title, stats, trim_outliers


@settings(deadline=None)
@given(title_idx=st.lists(st.integers(-3, 9), max_size=30), chunk=st.integers(1, 40))
def test_means_of_documents(title_idx: list[int], chunk: int) -> None:
    z_NK = np.random.default_rng(len(title_idx)).normal(size=(len(title_idx), 3)).astype(np.float32)
    titles_N = np.array(title_idx, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stats, "CHUNK_TOKENS", chunk)
        found = mean_pool_by_title(z_NK, titles_N)
    expected = [z_NK[titles_N == title].mean(axis=0) for title in np.unique(titles_N)]
    np.testing.assert_allclose(found, np.array(expected).reshape(-1, 3), atol=1e-6)
    assert found.dtype == np.float32


def test_sums_of_documents_keep_small_terms() -> None:
    z_NK = torch.cat([torch.full((1, 1), 2.0**24), torch.ones(999, 1)])
    assert mean_pool_by_title(z_NK, torch.zeros(1000, dtype=torch.int64)).item() == pytest.approx(
        (2**24 + 999) / 1000, rel=1e-7
    )


def test_means_take_bf16() -> None:
    assert mean_pool_by_title(torch.ones(4, 2, dtype=torch.bfloat16), [5, 5, 1, 5]).tolist() == [[1, 1], [1, 1]]


def test_shapes_of_documents_are_checked() -> None:
    with pytest.raises(ValueError, match=r"z \(3, 2\) must be \[N, K\] and title_idx \(2,\) \[N\]"):
        mean_pool_by_title(np.zeros((3, 2)), [0, 1])


def test_outliers_are_the_points_far_from_the_median() -> None:
    points = np.random.default_rng(0).normal(size=(99, 2))
    points = np.concatenate([points, [[1e6, 0.0]]])
    kept = trim_outliers(points, p=95)
    assert not kept[-1]
    assert kept.sum() == 95
    assert np.linalg.norm(points[kept], axis=1).max() < np.linalg.norm(points[~kept], axis=1).min() + 0.5
    assert trim_outliers(points, p=100).all()
    assert trim_outliers(np.zeros((0, 2))).shape == (0,)
    assert trim_outliers(np.ones((5, 2))).all()


def test_outliers_are_checked() -> None:
    with pytest.raises(ValueError, match=r"p \(101\) must be > 0 and <= 100"):
        trim_outliers(np.zeros((3, 2)), p=101)
    with pytest.raises(ValueError, match=r"X2 \(3,\) must be \[N, C\]"):
        trim_outliers(np.zeros(3))


def test_statistics_of_a_latent() -> None:
    found = compute_activation_stats(torch.tensor([0.0, 1.0, 2.0, 6.0, 0.5]), min_activation=0.5)
    assert found == pytest.approx(
        {
            "num_tokens": 5,
            "num_active": 3,
            "density": 0.6,
            "mean": 3.0,
            "std": 14**0.5 / 3**0.5,
            "median": 2.0,
            "min": 1.0,
            "max": 6.0,
        }
    )


@pytest.mark.parametrize("z_vals", [[], [0.0, 0.0], [-1.0]])
def test_a_latent_that_never_fires(z_vals: list[float]) -> None:
    found = compute_activation_stats(z_vals)
    assert found.pop("num_tokens") == len(z_vals)
    assert set(found.values()) == {0}


def test_activations_must_be_finite() -> None:
    with pytest.raises(ValueError, match=r"activations \(1 that are not\) must be finite"):
        compute_activation_stats([1.0, float("nan")])


@given(densities=st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1.0)), min_size=1, max_size=20))
def test_latents_that_never_fire_have_the_first_bin_of_densities_to_themselves(densities: list[float]) -> None:
    log_K = stats.log_densities(np.array(densities))
    count_H, _ = np.histogram(log_K, stats.DENSITY_BORDERS)
    assert count_H.sum() == len(densities)
    assert count_H[0] == densities.count(0.0)
    for density, log in zip(densities, log_K.tolist(), strict=True):
        if density > 10**-6.75:
            assert log == pytest.approx(np.log10(density))
