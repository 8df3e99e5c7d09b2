"""TernaryMatMul is TernaryTileMatMul with one tile, bit for bit, for texts of tokens; its function computes the same."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import float_constant_bytes, make_model, matmul_inputs, native_session, portable_session, random_ternary

from ort_ops.operators.ternary_matmul import TERNARY_MATMUL
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")

ATTRIBUTES: list[dict[str, float]] = [{}, {"group_size": 0}, {"activation_bits": 8}]
ATTRIBUTES += [{"activation_bits": 8, "group_size": 0, "min_magnitude": 3.0}]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.tuples(st.integers(0, 4), st.integers(0, 9), st.integers(0, 100), st.integers(0, 300)),
    attributes=st.sampled_from(ATTRIBUTES),
)
def test_it_is_a_tile_product_with_one_tile(seed: int, sizes: tuple[int, int, int, int], attributes: dict[str, float]) -> None:
    inputs, _ = matmul_inputs(np.random.default_rng(seed), *sizes)
    num_texts, num_tokens, num_rows, num_columns = sizes
    (y_BTN,) = native_session(make_model(TERNARY_MATMUL, **attributes)).run(None, inputs)
    tile = {
        "x": inputs["x"].reshape(num_texts * num_tokens, num_columns),
        "packed": inputs["packed"][None],
        "row_scale": inputs["row_scale"][None],
        "tile_idx": np.zeros(num_texts * num_tokens, np.int64),
    }
    (y_TN,) = native_session(make_model(TERNARY_TILE_MATMUL, **attributes)).run(None, tile)
    np.testing.assert_array_equal(y_BTN, y_TN.reshape(num_texts, num_tokens, num_rows), strict=True)


@pytest.mark.parametrize("attributes", ATTRIBUTES, ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 40, 70), (1, 5, 33, 300), (0, 5, 5, 5), (2, 0, 5, 5), (2, 2, 0, 5)])
def test_the_function_computes_the_same(sizes: tuple[int, int, int, int], attributes: dict[str, float]) -> None:
    inputs, _ = matmul_inputs(np.random.default_rng(1), *sizes)
    model = make_model(TERNARY_MATMUL, with_functions=True, **attributes)
    (expected,) = native_session(model).run(None, inputs)
    (found,) = portable_session(model).run(None, inputs)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * max(np.abs(expected).max(initial=0), 1))


def test_constant_weights_give_the_same_results() -> None:
    inputs, _ = matmul_inputs(np.random.default_rng(2), 2, 5, 7, 13)
    weights = {name: inputs[name] for name in ("packed", "row_scale")}
    constant = native_session(make_model(TERNARY_MATMUL, constants=weights)).run(None, {"x": inputs["x"]})[0]
    np.testing.assert_array_equal(constant, native_session(make_model(TERNARY_MATMUL)).run(None, inputs)[0])


def test_results_do_not_depend_on_threads() -> None:
    inputs, _ = matmul_inputs(np.random.default_rng(3), 3, 100, 200, 333)
    model = make_model(TERNARY_MATMUL, activation_bits=8, group_size=0)
    one, many = (native_session(model, num_threads=threads).run(None, inputs)[0] for threads in (1, 5))
    np.testing.assert_array_equal(one, many, strict=True)


def inferred_shapes(dims: dict[str, Any]) -> list[Any]:
    session = native_session(make_model(TERNARY_MATMUL, dims=dims, output_shapes=False))
    return [output.shape for output in session.get_outputs()]


def test_shapes_are_inferred_from_numbers_and_names() -> None:
    assert inferred_shapes({"x": [2, 5, 8], "row_scale": [3]}) == [[2, 5, 3]]
    assert inferred_shapes({"x": ["texts", "tokens", 8], "row_scale": ["rows"]}) == [["texts", "tokens", "rows"]]


@pytest.mark.parametrize("unknown", [None, [None, None, 8], [7], [7, 8]])
def test_unknown_shapes_stay_unknown(unknown: Any) -> None:
    for shape in inferred_shapes({"x": unknown, "row_scale": [3]}):
        assert not any(isinstance(dim, int) for dim in shape or [])


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


PANEL_SHAPE = "must end in [ceil(rows / 32), ceil(columns / 16), 128] = [1, 1, 128] for 4 rows and the 10 columns of x"
REJECTIONS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "rank of x": ({"x": f32(5, 10)}, "rank of x (2, shape [5, 10]) must be 3 [B, T, K]"),
    "rank of packed": (
        {"packed": np.zeros((1, 1, 1, 128), np.uint8)},
        "rank of packed (4, shape [1, 1, 1, 128]) must be 3 [ceil(N/32), ceil(K/16), 128]",
    ),
    "rank of row_scale": ({"row_scale": f32(1, 4)}, "rank of row_scale (2, shape [1, 4]) must be 1 [N]"),
    "many blocks": ({"packed": np.zeros((1, 2, 128), np.uint8)}, f"shape of packed [1, 2, 128] {PANEL_SHAPE}"),
    "reserved code": (
        {"packed": np.full((1, 1, 128), 0x5D, np.uint8)},
        "byte packed[0, 0, 0] (0x5d) must hold only the codes 00, 01 and 10, it holds 11",
    ),
    "padded columns": (
        {"packed": to_panels(np.ones((4, 11), np.int8))},
        "packed must hold 0 (code 01) past the last of 10 columns, columns up to 11 hold another code",
    ),
    "padded rows": (
        {"packed": to_panels(np.ones((7, 10), np.int8))},
        "packed must hold 0 (code 01) past the last of 4 rows, rows up to 7 hold another code",
    ),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_it_rejects(case: str) -> None:
    changes, text = REJECTIONS[case]
    good = {"x": f32(2, 5, 10), "packed": to_panels(np.zeros((4, 10), np.int8)), "row_scale": f32(4)}
    session = native_session(make_model(TERNARY_MATMUL, dims=dict.fromkeys(good)))
    assert session.run(None, good)[0].shape == (2, 5, 4)
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's InvalidArgument is no public name
        session.run(None, good | changes)
    assert f"TernaryMatMul: {text}" in str(failure.value)
    assert type(failure.value).__name__ == "InvalidArgument"
    assert session.run(None, good)[0].shape == (2, 5, 4), "a rejected run leaves the session usable"


def test_a_constant_with_the_reserved_code_is_refused_when_the_session_is_made() -> None:
    with pytest.raises(Exception, match="must hold only the codes 00, 01 and 10"):
        native_session(make_model(TERNARY_MATMUL, constants={"packed": np.full((1, 1, 128), 0x75, np.uint8)}))


@pytest.mark.parametrize("bits", [24, 8])
def test_a_token_with_a_value_that_is_not_finite_is_nan(bits: int) -> None:
    x = np.ones((1, 3, 300), np.float32)
    x[0, 0, 3], x[0, 1, 290] = np.nan, -np.inf
    weight = random_ternary(np.random.default_rng(6), 3, 300)
    inputs = {"x": x, "packed": to_panels(weight), "row_scale": np.ones(3, np.float32)}
    y = native_session(make_model(TERNARY_MATMUL, activation_bits=bits)).run(None, inputs)[0]
    np.testing.assert_allclose(y, [[[np.nan] * 3, [np.nan] * 3, weight.sum(-1)]], rtol=1e-6)


def test_the_function_keeps_constant_weights_packed() -> None:
    inputs, _ = matmul_inputs(np.random.default_rng(2), 1, 4, 64, 256)
    weights = {name: inputs[name] for name in ("packed", "row_scale")}
    model = make_model(TERNARY_MATMUL, constants=weights, with_functions=True)
    assert float_constant_bytes(model) < inputs["packed"].nbytes + 256 * 4 * 4
