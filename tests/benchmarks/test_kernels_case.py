"""The benchmark of the kernels: every contender computes the same product, and the table can be made of a record."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kernel_models
from cases import kernels

pytestmark = pytest.mark.usefixtures("native_library")


def test_all_contenders_compute_the_same_product() -> None:
    rng = np.random.default_rng(0)
    weight_NK = rng.integers(-1, 2, (256, 512), dtype=np.int8)
    x = rng.standard_normal((3, 512), dtype=np.float32)
    exact = x @ weight_NK.T * kernel_models.SCALE
    runs = {name: bind(x) for name, bind in kernels.sessions(weight_NK, 1).items()}
    runs |= {name: bind(x) for name, bind in kernels.torch_products(weight_NK, 1).items()}
    for name, run in runs.items():
        y = run()
        y = y[0].numpy() if isinstance(y, list) else y.detach().float().numpy()
        assert np.abs(y - exact).max() < 0.03 * np.abs(exact).max(), name


def test_a_stack_is_that_many_products() -> None:
    weight = np.eye(128, dtype=np.int8)
    node, constants, inputs = kernel_models.PRODUCTS["trix 24 bit"](weight)
    session = kernel_models.session(kernel_models.stacked(node, constants, inputs, 3), 1, True)
    (y,) = kernel_models.bind(session, np.ones((1, 128), np.float32))()
    np.testing.assert_allclose(y.numpy(), np.full((1, 128), kernel_models.SCALE**3), rtol=1e-6)


def test_tiles_are_parts_of_the_dense_layer() -> None:
    rng = np.random.default_rng(1)
    up, down = rng.integers(-1, 2, (64, 96), dtype=np.int8), rng.integers(-1, 2, (96, 64), dtype=np.int8)
    x = rng.standard_normal((5, 96), dtype=np.float32)
    hidden = np.maximum(x @ up.T * kernel_models.SCALE, 0.0) ** 2
    (dense,) = kernel_models.bind(kernel_models.session(kernel_models.layer(up, down, 1), 1, True), x)()
    np.testing.assert_allclose(dense.numpy(), hidden @ down.T * kernel_models.SCALE, rtol=0.1, atol=1e-3)
    (routed,) = kernel_models.bind(kernel_models.session(kernel_models.layer(up, down, 4), 1, True), x)()
    parts = hidden.reshape(5, 4, 16).transpose(1, 0, 2) @ down.T.reshape(4, 16, 96) * kernel_models.SCALE
    # Of each token one part, times a weight in (0, 1).
    share = (routed.numpy() * parts).sum(-1) / (parts**2).sum(-1)
    left = np.abs(routed.numpy() - share[..., None] * parts).max(-1)
    assert (left.min(axis=0) < 0.02 * np.abs(parts).max()).all()


def test_table_and_drawing_of_a_record() -> None:
    times = {name: [2e-3, 1e-3, 3e-3] for name in kernel_models.PRODUCTS} | {"trix 8 bit": [1e-4] * 3}
    row = partial(kernels._row, (4096, 4096))
    results = {
        "limits": {"int8_products_per_s": 2.3e11, "bytes_read_per_s": 3e10},
        "products": [row(1, 1, "hot", times), row(1, 1, "cold", times), row(8, 2, "hot", times)],
        "tiles": [{"tiles": 4, "tokens": 1, "dense_s": 1e-4, "routed_s": 5e-5}],
        "routing": [{"tiles": 64, "ours_s": 1e-5, "float32_s": 2e-5}],
        "memory": {"packed_bytes": 100, "resident_bytes": 107},
    }
    table = kernels.table(results)
    assert "ort 2 bit, 128 20.0 (goal 2.5)" in table
    assert "73% |" in table  # of the products
    assert "140% |" in table  # of the bytes
    assert "packed weights: 1.07" in table
    assert kernels.figure(results).axes[0].get_lines()
