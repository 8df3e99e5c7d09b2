"""How exact TernaryTileMatMul is with activations of 24 and of 8 bits, and what it makes of special values."""

import numpy as np
import pytest
from packed_models import (
    make_model,
    native_session,
    quantised,
    random_ternary,
    route_inputs,
    run_tile_matmul,
    score_reference,
    tile_matmul_inputs,
    tile_matmul_reference,
)

from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")


@pytest.mark.parametrize("bits", [24, 8])
def test_a_token_with_a_value_that_is_not_finite_is_nan(bits: int) -> None:
    x = np.ones((4, 300), np.float32)
    x[0, 3], x[1, 290], x[3] = np.nan, -np.inf, 2.0**-101  # the last counts as zeros
    weight = random_ternary(np.random.default_rng(6), 1, 3, 300)
    inputs = {"x": x, "packed": to_panels(weight), "row_scale": np.ones((1, 3), np.float32), "tile_idx": np.zeros(4, np.int64)}
    y = native_session(make_model(TERNARY_TILE_MATMUL, activation_bits=bits)).run(None, inputs)[0]
    expected = np.array([[np.nan] * 3, [np.nan] * 3, weight[0].sum(-1), np.zeros(3)])
    np.testing.assert_allclose(y, expected, rtol=1e-6)


KINDS = ["gaussian", "heavy tails", "outlier channels", "one massive channel", "clustered"]


def activations(kind: str, rng: np.random.Generator, num_tokens: int, width: int) -> np.ndarray:
    x = rng.standard_normal((num_tokens, width), dtype=np.float32)
    if kind == "heavy tails":
        x = rng.standard_t(2, x.shape).astype(np.float32)
    if kind == "outlier channels":
        x[:, rng.integers(0, width, 8)] *= 30
    if kind == "one massive channel":
        x[:, width // 4] = 1000
    if kind == "clustered":
        x = rng.standard_normal((8, width), dtype=np.float32)[rng.integers(0, 8, num_tokens)] + 0.01 * x
    return x


@pytest.mark.parametrize("kind", KINDS)
def test_24_bits_are_as_exact_as_float32(kind: str) -> None:
    """Whatever the activations are like, the error is that of rounding to float32: a product of float32 has 1e-7 to 3e-7."""
    rng = np.random.default_rng(14)
    inputs, weight = tile_matmul_inputs(rng, 8, 1, 256, 4096)
    inputs["x"] = activations(kind, rng, 8, 4096)
    exact = tile_matmul_reference(inputs, weight)
    error = np.sqrt(np.mean((run_tile_matmul(inputs) - exact) ** 2) / np.mean(exact**2))
    assert error <= 6e-7


@pytest.mark.parametrize("left_out", [(), ("score",)])
@pytest.mark.parametrize("kind", KINDS)
def test_routing_is_exact(kind: str, left_out: tuple[str, ...]) -> None:
    """The tile is the one of float64 for every token but those whose best two keys are equal within float32 rounding.

    Without scores to hand over, tiles are scored in 8 bits first.
    """
    rng = np.random.default_rng(15)
    inputs, signatures = route_inputs(rng, 4000, 512, 512)
    inputs["x"] = activations(kind, rng, 4000, 512)
    key = score_reference(inputs, signatures) + inputs["bias"]
    second, best = np.sort(key, axis=1)[:, -2:].T
    size = np.abs(inputs["x"]).astype(np.float64) @ np.abs(signatures.T) / np.sqrt(np.abs(signatures).sum(-1))
    is_tie = best - second <= 2 * np.finfo(np.float32).eps * size.max(axis=1)
    model = make_model(SIGNATURE_ROUTE, gate=0, left_out=left_out)
    differs = native_session(model).run(["tile_idx"], inputs)[0][:, 0] != key.argmax(axis=1)
    assert not (differs & ~is_tie).any()
    assert is_tie.mean() < 0.02


@pytest.mark.parametrize("min_magnitude", [0.0, 3.0])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize(
    ("num_tokens", "num_tiles", "num_rows", "num_columns"),
    [(1, 1, 1, 1), (5, 3, 40, 70), (17, 2, 33, 300), (9, 1, 64, 128), (3, 2, 5, 0), (0, 2, 5, 5), (70, 4, 100, 129)],
)
def test_int8_product_equals_reference(
    num_tokens: int, num_tiles: int, num_rows: int, num_columns: int, group_size: int, min_magnitude: float
) -> None:
    inputs, weight = tile_matmul_inputs(np.random.default_rng(11), num_tokens, num_tiles, num_rows, num_columns)
    model = make_model(TERNARY_TILE_MATMUL, activation_bits=8, group_size=group_size, min_magnitude=min_magnitude)
    y = native_session(model).run(None, inputs)[0]
    expected = tile_matmul_reference(inputs | {"x": quantised(inputs["x"], group_size, min_magnitude)}, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("group_size", [0, 128])
def test_int8_product_does_not_depend_on_threads(group_size: int) -> None:
    inputs, _ = tile_matmul_inputs(np.random.default_rng(12), 300, 3, 200, 333)
    model = make_model(TERNARY_TILE_MATMUL, activation_bits=8, group_size=group_size)
    one, many = (native_session(model, num_threads=threads).run(None, inputs)[0] for threads in (1, 5))
    np.testing.assert_array_equal(one, many, strict=True)


def test_error_of_int8_activations_is_that_of_rounding() -> None:
    """At most half a step of the quantiser in every column; groups have steps of their own, so an outlier hurts less."""
    inputs, weight = tile_matmul_inputs(np.random.default_rng(13), 4, 1, 64, 1024)
    inputs["x"][:, 5] = 50.0
    exact = tile_matmul_reference(inputs, weight)
    errors = []
    for group_size in (0, 128):
        model = make_model(TERNARY_TILE_MATMUL, activation_bits=8, group_size=group_size)
        y = native_session(model).run(None, inputs)[0]
        step = np.abs(inputs["x"]).max() / 127
        assert (np.abs(y - exact) <= 0.5001 * step * 1024 * inputs["row_scale"][0]).all()
        errors.append(float(np.sqrt(np.mean((y - exact) ** 2))))
    assert errors[1] < 0.6 * errors[0], errors
