"""The benchmark of sparse lookup layers: both contenders compute the same, and the table can be made of a record."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_models
from cases import sparse_lookup

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.mark.parametrize("has_hinges", [0, 1])
def test_layers_compute_the_same_with_and_without_the_library(has_hinges: int) -> None:
    model = sparse_lookup.layers(64, has_hinges)
    x = np.random.default_rng(1).standard_normal((3, 64), dtype=np.float32)
    ours, plain = (kernel_models.session(model, 1, is_native).run(None, {"x": x})[0] for is_native in (True, False))
    assert not np.array_equal(ours, x)
    np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-5 * np.abs(plain).max())


def test_table_of_a_record() -> None:
    row = {"kind": "grid", "width": 128, "tokens": 1, "ours_s": 1e-6, "plain_s": 2e-5}
    assert "| grid | 128 | 1 | 1.0 | 20.0 | 20.0 (goal 20) |" in sparse_lookup.table({"layers": [row]})
