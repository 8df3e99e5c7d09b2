"""The operators in standard ONNX ops: they run without the native library and compute the same."""

import numpy as np
import onnx
import pytest
from onnx import helper
from packed_models import (
    float_constant_bytes,
    make_model,
    portable_session,
    quantised,
    rank_tiles,
    route_inputs,
    score_reference,
    tile_matmul_inputs,
    tile_matmul_reference,
)

from ort_ops.operators import SCHEMAS, fallback_functions, register_schemas
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN, OpSchema


def run_portable(op: OpSchema, inputs: dict[str, np.ndarray], **attributes: object) -> list[np.ndarray]:
    return portable_session(make_model(op, with_functions=True, **attributes)).run(None, inputs)


@pytest.mark.parametrize(
    ("num_tokens", "num_tiles", "num_rows", "num_columns"),
    [(0, 3, 4, 5), (1, 1, 1, 1), (3, 4, 0, 5), (6, 8, 5, 16), (50, 5, 30, 63), (300, 16, 33, 130)],
)
def test_tile_matmul_function_equals_reference(num_tokens: int, num_tiles: int, num_rows: int, num_columns: int) -> None:
    inputs, weight = tile_matmul_inputs(np.random.default_rng(num_tokens), num_tokens, num_tiles, num_rows, num_columns)
    (y,) = run_portable(TERNARY_TILE_MATMUL, inputs)
    assert y.shape == (num_tokens, num_rows)
    np.testing.assert_allclose(y, tile_matmul_reference(inputs, weight), rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    ("num_tokens", "num_tiles", "num_columns", "top_k"),
    [(0, 3, 4, 2), (1, 1, 1, 1), (5, 4, 7, 4), (40, 100, 130, 3)],
)
def test_route_function_equals_reference(num_tokens: int, num_tiles: int, num_columns: int, top_k: int) -> None:
    inputs, signatures = route_inputs(np.random.default_rng(top_k), num_tokens, num_tiles, num_columns)
    tile_idx, _, score = run_portable(SIGNATURE_ROUTE, inputs, top_k=top_k)
    assert tile_idx.shape == (num_tokens, top_k)
    np.testing.assert_allclose(score, score_reference(inputs, signatures), rtol=0, atol=1e-5)
    np.testing.assert_array_equal(tile_idx, rank_tiles(score + inputs["bias"], top_k))


def test_top_k_attribute_defaults_to_one() -> None:
    inputs, _ = route_inputs(np.random.default_rng(0), 5, 4, 9)
    np.testing.assert_array_equal(run_portable(SIGNATURE_ROUTE, inputs)[0], run_portable(SIGNATURE_ROUTE, inputs, top_k=1)[0])


def test_ties_and_nan_in_the_function() -> None:
    inputs = {
        "x": np.zeros((2, 4), np.float32),
        "signatures": to_panels(np.ones((6, 4), np.int8)),
        "bias": np.array([np.nan, 0, 1, 1, 0, np.nan], np.float32),
        "log_mass": np.zeros(6, np.float32),
    }
    np.testing.assert_array_equal(run_portable(SIGNATURE_ROUTE, inputs, top_k=4)[0], [[2, 3, 1, 4]] * 2)
    all_nan = inputs | {"bias": np.full(6, np.nan, np.float32)}
    np.testing.assert_array_equal(run_portable(SIGNATURE_ROUTE, all_nan)[0], [[0]] * 2)


@pytest.mark.parametrize("min_magnitude", [0.0, 3.0])
@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize(("num_tokens", "num_rows", "num_columns"), [(1, 1, 1), (5, 40, 70), (3, 5, 300), (0, 5, 5)])
def test_the_function_quantises_as_the_attributes_say(
    num_tokens: int, num_rows: int, num_columns: int, group_size: int, min_magnitude: float
) -> None:
    inputs, weight = tile_matmul_inputs(np.random.default_rng(3), num_tokens, 2, num_rows, num_columns)
    inputs["x"][:1, :16] = 0.0
    (y,) = run_portable(TERNARY_TILE_MATMUL, inputs, activation_bits=8, group_size=group_size, min_magnitude=min_magnitude)
    expected = tile_matmul_reference(inputs | {"x": quantised(inputs["x"], group_size, min_magnitude)}, weight)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_reserved_code_shows_as_nan() -> None:
    inputs, _ = tile_matmul_inputs(np.random.default_rng(1), 2, 1, 3, 8)
    inputs["packed"][0, 0, 0, 4] |= 0x03  # row 1, column 0
    (y,) = run_portable(TERNARY_TILE_MATMUL, inputs)
    assert np.isnan(y[:, 1]).all()
    assert np.isfinite(y[:, [0, 2]]).all()


def test_function_keeps_constant_weights_packed() -> None:
    """The optimiser must not fold the tiles into float weights, 16 times their size."""
    inputs, _ = tile_matmul_inputs(np.random.default_rng(2), 4, 8, 64, 256)
    weights = {name: inputs[name] for name in ("packed", "row_scale")}
    model = make_model(TERNARY_TILE_MATMUL, constants=weights, with_functions=True)
    assert float_constant_bytes(model) < inputs["packed"].nbytes


def test_functions_are_valid_and_named_like_the_schema() -> None:
    register_schemas()
    for op, function in zip(SCHEMAS, fallback_functions(), strict=True):
        assert (function.domain, function.name) == (DOMAIN, op.name)
        assert list(function.input) == [tensor.name for tensor in op.inputs]
        assert list(function.output) == [tensor.name for tensor in op.outputs]
        onnx.checker.check_model(make_model(op, with_functions=True), full_check=True)


def test_schemas_register_once_and_describe_the_operators() -> None:
    register_schemas()
    register_schemas()
    for op in SCHEMAS:
        registered = onnx.defs.get_schema(op.name, domain=DOMAIN)
        assert registered.since_version == 1
        assert [parameter.name for parameter in registered.inputs] == [tensor.name for tensor in op.inputs]
        assert [parameter.name for parameter in registered.outputs] == [tensor.name for tensor in op.outputs]
        defaults = {name: helper.get_attribute_value(a.default_value) for name, a in registered.attributes.items()}
        assert defaults == {attribute.name: pytest.approx(attribute.default) for attribute in op.attributes}
        onnx.checker.check_model(make_model(op), full_check=True)
