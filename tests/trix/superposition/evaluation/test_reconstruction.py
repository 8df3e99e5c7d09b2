"""The measures of a reconstruction: the same whatever the batches, and exact where float32 would not be."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trix.superposition.evaluation.reconstruction import ReconstructionMetric, max_decoder_cosine
from trix.superposition.sae import TopKSAE


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_the_batches_do_not_matter(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, x_hat = torch.randn(sum(sizes), 3, generator=generator) + 100, torch.randn(sum(sizes), 3, generator=generator) + 100
    z = torch.randn(sum(sizes), 5, generator=generator).relu()
    parts, whole = ReconstructionMetric(3, 5), ReconstructionMetric(3, 5)
    whole.update(x_hat, x, z)
    for part in zip(x_hat.split(sizes), x.split(sizes), z.split(sizes), strict=True):
        parts.update(*part)
    for name, value in whole.compute().items():
        assert float(parts.compute()[name]) == pytest.approx(float(value), rel=1e-9, nan_ok=True)


def test_what_is_perfect_and_what_is_the_mean() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    z = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 2.0]])
    gamma = float(x.mean(dim=0).norm() / x.std(dim=0, correction=0).norm())
    metric = ReconstructionMetric(2, 2)
    metric.update(x, x, z)
    found = {name: float(value) for name, value in metric.compute().items()}
    perfect = {"explained_variance": 1.0, "reconstruction": 0.0, "mse": 0.0, "cosine": 1.0, "l2_ratio": 1.0}
    assert found == pytest.approx(perfect | {"active": 2 / 3, "dead": 0.5, "frequent": 0.5, "dense": 0.5, "gamma": gamma})
    metric.reset()
    metric.update(x.mean(dim=0).expand(3, 2), x, z)
    assert float(metric.compute()["explained_variance"]) == pytest.approx(0.0, abs=1e-12)
    assert metric.density_K.tolist() == pytest.approx([0.0, 2 / 3])


def test_every_measure_is_what_numpy_makes_of_it() -> None:
    generator = np.random.default_rng(0)
    x, x_hat = generator.normal(3, 2, (500, 4)), generator.normal(3, 2, (500, 4))
    z = np.maximum(generator.normal(-2, 1, (500, 6)), 0) * [1, 1, 1, 1, 0, 100]
    x[7] = 0  # a token of norm 0 has no direction
    metric = ReconstructionMetric(4, 6)
    metric.update(*map(torch.from_numpy, (x_hat, x, z)))
    error, norm, norm_hat = ((x - x_hat) ** 2).sum(), np.linalg.norm(x, axis=1), np.linalg.norm(x_hat, axis=1)
    has_norm, share = norm > 0, (z > 0).mean(axis=0)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(
        {
            "explained_variance": 1 - error / ((x - x.mean(axis=0)) ** 2).sum(),
            "reconstruction": error / (x**2).sum(),
            "mse": ((x - x_hat) ** 2).mean(),
            "cosine": ((x * x_hat).sum(axis=1)[has_norm] / (norm * norm_hat)[has_norm]).sum() / 500,
            "l2_ratio": (norm_hat[has_norm] / norm[has_norm]).sum() / 500,
            "gamma": np.linalg.norm(x.mean(axis=0)) / np.linalg.norm(x.std(axis=0)),
            "active": share.sum(),
            "dead": (share == 0).mean(),
            "frequent": (share > 0.01).mean(),
            "dense": (share > 0.1).mean(),
        }
    )


@pytest.mark.parametrize("k", [3, 1500])  # more than one block of rows
def test_the_nearest_decoder_row_is_another_one(k: int) -> None:
    torch.manual_seed(0)
    sae = TopKSAE(5, k, active=1)
    with torch.no_grad():
        sae.W_dec[2] = 3 * sae.W_dec[0]
    found = max_decoder_cosine(sae)
    row = sae.W_dec.detach().double()
    cosine = torch.nn.functional.cosine_similarity(row[:, None], row[None], dim=-1).fill_diagonal_(-2)
    assert torch.allclose(found, cosine.amax(dim=-1))
    assert found[0] == pytest.approx(1.0)
    assert torch.isnan(max_decoder_cosine(TopKSAE(5, 1, active=1))).all()
