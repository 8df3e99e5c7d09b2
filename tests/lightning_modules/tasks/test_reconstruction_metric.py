"""The measures of a reconstruction: the same whatever the batches, and exact where float32 would not be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules.tasks.reconstruction_metric import ReconstructionMetric


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
    metric = ReconstructionMetric(2, 2)
    metric.update(x, x, z)
    found = {name: float(value) for name, value in metric.compute().items()}
    assert found == pytest.approx(
        {"explained_variance": 1.0, "reconstruction": 0.0, "active": 2 / 3, "dead": 0.5, "dense": 0.5}
    )
    metric.reset()
    metric.update(x.mean(dim=0).expand(3, 2), x, z)
    assert float(metric.compute()["explained_variance"]) == pytest.approx(0.0, abs=1e-12)
    assert metric.density_K.tolist() == pytest.approx([0.0, 2 / 3])
