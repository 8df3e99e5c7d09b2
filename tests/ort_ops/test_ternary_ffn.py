"""TernaryFFN in a real session, on the native and on the portable path: values, what is left out, and every rejection."""

import numpy as np
import pytest
from packed_models import ffn_inputs, make_model, native_session, portable_session, run_tile_matmul

from ort_ops.operators.ternary_ffn import TERNARY_FFN
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")

SIZES = [(1, 1, 1, 1, 1), (5, 1, 3, 40, 70), (7, 2, 4, 64, 32), (33, 3, 5, 20, 100), (0, 2, 2, 8, 8), (70, 1, 16, 129, 33)]
UNKNOWN_RANKS = {tensor.name: None for tensor in TERNARY_FFN.inputs}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_both_paths_equal_the_reference(sizes: tuple[int, int, int, int, int]) -> None:
    inputs, expected = ffn_inputs(np.random.default_rng(0), *sizes)
    model = make_model(TERNARY_FFN, with_functions=True)
    bound = 1e-6 * np.abs(expected).max(initial=1.0)
    for session in (native_session(model), portable_session(model)):
        np.testing.assert_allclose(session.run(None, inputs)[0], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("group_size", [0, 128])
def test_both_paths_quantise_alike(group_size: int) -> None:
    inputs, expected = ffn_inputs(np.random.default_rng(1), 20, 2, 4, 200, 300)
    model = make_model(TERNARY_FFN, with_functions=True, activation_bits=8, group_size=group_size)
    native, portable = (session.run(None, inputs)[0] for session in (native_session(model), portable_session(model)))
    scale = np.abs(expected).max()
    # A hidden value at the border of two steps may go either way; one such step is all that may differ.
    np.testing.assert_allclose(native, portable, rtol=0, atol=2e-3 * scale)
    assert 1e-4 < np.abs(native - expected).max() / scale < 0.05


def test_it_is_two_products_with_a_squared_relu_between_them() -> None:
    inputs, _ = ffn_inputs(np.random.default_rng(2), 9, 1, 3, 50, 60)
    inputs["weight"][:] = 1.0
    tile_idx = inputs["tile_idx"][:, 0]
    up = {"x": inputs["x"], "packed": inputs["up"], "row_scale": inputs["up_scale"], "tile_idx": tile_idx}
    hidden = np.maximum(run_tile_matmul(up), 0.0) ** 2
    y = run_tile_matmul({"x": hidden, "packed": inputs["down"], "row_scale": inputs["down_scale"], "tile_idx": tile_idx})
    np.testing.assert_array_equal(native_session(make_model(TERNARY_FFN)).run(None, inputs)[0], y)


def test_a_tile_of_weight_zero_counts_for_nothing() -> None:
    inputs, _ = ffn_inputs(np.random.default_rng(3), 4, 2, 3, 16, 16)
    inputs["weight"] = np.array([[1, 0], [0, 1], [0, 0], [1, 1]], np.float32)
    inputs["x"][2] = np.inf  # not computed, so no NaN
    model = make_model(TERNARY_FFN, with_functions=True)
    for session in (native_session(model), portable_session(model)):
        y = session.run(None, inputs)[0]
        np.testing.assert_array_equal(y[2], np.zeros(16, np.float32))
        swapped = inputs | {name: inputs[name][:, ::-1].copy() for name in ("tile_idx", "weight")}
        np.testing.assert_allclose(session.run(None, swapped)[0], y, rtol=1e-5)


@pytest.mark.parametrize("bits", [24, 8])
def test_results_do_not_depend_on_threads(bits: int) -> None:
    inputs, _ = ffn_inputs(np.random.default_rng(4), 150, 2, 4, 100, 200)
    model = make_model(TERNARY_FFN, activation_bits=bits)
    one, many = (native_session(model, num_threads=threads).run(None, inputs)[0] for threads in (1, 5))
    np.testing.assert_array_equal(one, many, strict=True)


@pytest.mark.parametrize(("width", "num_hidden"), [(0, 5), (8, 0)])
def test_empty_widths(width: int, num_hidden: int) -> None:
    inputs, expected = ffn_inputs(np.random.default_rng(5), 3, 1, 2, width, num_hidden)
    np.testing.assert_array_equal(native_session(make_model(TERNARY_FFN)).run(None, inputs)[0], expected)


REJECTIONS = {
    "tile_idx of other tokens": (
        {"tile_idx": np.zeros((4, 2), np.int64)},
        "length of tile_idx (4) must be the number of tokens",
    ),
    "weight of another k": ({"weight": np.ones((5, 1), np.float32)}, "shape of weight [5, 1] must be that of tile_idx [5, 2]"),
    "tile too large": (
        {"tile_idx": np.full((5, 2), 3)},
        "tile_idx (3, at place 0) must be >= 0 and < the number of tiles (3)",
    ),
    "tile negative": (
        {"tile_idx": np.array([[0, 1], [0, -1], [0, 0], [0, 0], [0, 0]])},
        "tile_idx (-1, at place 3) must be >= 0 and < the number of tiles (3)",
    ),
    "tiles of down": (
        {"down": to_panels(np.zeros((2, 20, 10), np.int8))},
        "number of tiles of down (2) must be that of up (3)",
    ),
    "rows of down_scale": ({"down_scale": np.ones((3, 19), np.float32)}, "rows of down_scale (19) must be the width of x (20)"),
    "hidden values": (
        {"up_scale": np.ones((3, 33), np.float32)},
        "shape of up [3, 1, 2, 128] must end in [ceil(rows / 32), ceil(columns / 16), 128] = [2, 2, 128] for 33 rows",
    ),
    "padding of down": (
        {"down": to_panels(np.ones((3, 20, 12), np.int8))},
        "down must hold 0 (code 01) past the last of 10 columns, columns up to 12 hold another code",
    ),
    "reserved code": ({"up": np.full((3, 1, 2, 128), 0xFF, np.uint8)}, "byte up[0, 0, 0, 0] (0xff) must hold only the codes"),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_wrong_inputs_are_rejected(case: str) -> None:
    changes, text = REJECTIONS[case]
    good, _ = ffn_inputs(np.random.default_rng(6), 5, 2, 3, 20, 10)
    session = native_session(make_model(TERNARY_FFN, dims=UNKNOWN_RANKS))
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's InvalidArgument is no public name
        session.run(None, good | changes)
    assert f"TernaryFFN: {text}" in str(failure.value)
    assert type(failure.value).__name__ == "InvalidArgument"
    assert session.run(None, good)[0].shape == (5, 20)
