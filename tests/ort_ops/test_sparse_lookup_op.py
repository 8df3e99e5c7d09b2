"""SparseLookup in a real session, on the native and on the portable path, and in torch: values and every rejection."""

import numpy as np
import onnx
import pytest
import torch
from packed_models import lookup_inputs, make_model, native_session, portable_session

from ort_ops.schema import SPARSE_LOOKUP
from trix.functional.lookup import sparse_lookup

pytestmark = pytest.mark.usefixtures("native_library")

# tokens, top_k, tiles, width, hidden values, grid_size
SIZES = [
    (1, 1, 1, 1, 1, 1),
    (5, 2, 3, 40, 9, 3),
    (1, 1, 64, 128, 32, 16),
    (23, 3, 4, 64, 67, 20),
    (0, 2, 2, 8, 8, 4),
    (33, 1, 5, 130, 256, 33),
]
TOKENS = ("x", "h", "tile_idx", "score")
KINDS = [{"has_hinges": 0}, {"has_hinges": 1}]
UNKNOWN_RANKS = {tensor.name: None for tensor in SPARSE_LOOKUP.inputs}


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_paths_equal_the_reference(sizes: tuple[int, int, int, int, int, int], kind: dict[str, int]) -> None:
    attributes = {"grid_size": sizes[-1], **kind}
    inputs, y, point = lookup_inputs(np.random.default_rng(0), *sizes, **kind)
    constants = {name: array for name, array in inputs.items() if name not in TOKENS} if sizes[0] == 1 else {}
    model = make_model(SPARSE_LOOKUP, constants=constants, with_functions=True, **attributes)
    fed = {name: array for name, array in inputs.items() if name not in constants}
    answers = [session.run(None, fed) for session in (native_session(model), portable_session(model))]
    in_torch = sparse_lookup(*map(torch.from_numpy, inputs.values()), sizes[-1], bool(kind["has_hinges"]))
    for actual_y, actual_point in [*answers, tuple(value.numpy() for value in in_torch)]:
        np.testing.assert_allclose(actual_y, y, rtol=0, atol=1e-5 * np.abs(y).max(initial=1.0))
        np.testing.assert_allclose(actual_point, point, rtol=0, atol=2e-6)
        assert actual_y.dtype == actual_point.dtype == np.float32


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
def test_the_ends_of_plane_and_curve(kind: dict[str, int]) -> None:
    """Points at the border, gates at both ends, where the last cell and the last segment must be taken."""
    inputs, _, _ = lookup_inputs(np.random.default_rng(1), 4, 1, 1, 6, 2, 5, **kind)
    inputs["point_bias"] = np.zeros(2, np.float32)
    inputs["point_weight"] = np.array([[1e4, 0], [0, 1e4]], np.float32)
    inputs["compress"] = np.zeros((6, 2), np.float32)
    inputs["compress_bias"] = np.array([8.0, 9.0], np.float32)
    inputs["score"] = np.array([[-np.inf], [np.inf], [-200.0], [200.0]], np.float32)
    spline = np.zeros((1, 21), np.float32) if kind["has_hinges"] else np.zeros((1, 36), np.float32)
    spline[0, -1] = 3.0  # the base, or the corner (1, 1)
    inputs["splines"] = spline
    model = make_model(SPARSE_LOOKUP, with_functions=True, grid_size=5, **kind)
    for session in (native_session(model), portable_session(model)):
        y, point = session.run(None, inputs)
        np.testing.assert_array_equal(point, np.ones((4, 2), np.float32))
        size = 3.0 * inputs["gate_curve"][[0, -1, 0, -1], None]
        np.testing.assert_allclose(y, inputs["x"] + size * inputs["direction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
@pytest.mark.parametrize("name", ["x", "h", "score"])
def test_nan_stays_with_its_token(name: str, kind: dict[str, int]) -> None:
    inputs, y, _ = lookup_inputs(np.random.default_rng(2), 30, 1, 1, 20, 30, **kind)
    inputs[name][7] = np.nan
    actual = native_session(make_model(SPARSE_LOOKUP, **kind)).run(None, inputs)[0]
    assert np.isnan(actual[7]).all()
    others = np.arange(30) != 7
    np.testing.assert_allclose(actual[others], y[others], rtol=0, atol=1e-5 * np.abs(y).max())


def test_without_tiles_per_token_x_stays_as_it_is() -> None:
    inputs, y, _ = lookup_inputs(np.random.default_rng(3), 5, 0, 2, 9, 4)
    inputs["x"][1] = y[1] = np.inf
    np.testing.assert_array_equal(native_session(make_model(SPARSE_LOOKUP)).run(None, inputs)[0], y)


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
def test_results_depend_neither_on_threads_nor_on_the_other_tokens(kind: dict[str, int]) -> None:
    inputs, _, _ = lookup_inputs(np.random.default_rng(4), 151, 2, 8, 70, 100, **kind)
    model = make_model(SPARSE_LOOKUP, **kind)
    one, many = (native_session(model, num_threads=threads).run(None, inputs) for threads in (1, 5))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    of_token = {name: inputs[name][50:51] for name in TOKENS}
    np.testing.assert_array_equal(native_session(model).run(None, inputs | of_token)[0], one[0][50:51])


def test_shapes_are_inferred() -> None:
    model = make_model(SPARSE_LOOKUP, output_shapes=False, dims={"x": ["T", 8], "h": ["T", 8]})
    outputs = {value.name: value.shape for value in native_session(model).get_outputs()}
    assert outputs == {"y": ["T", 8], "point": ["T", 2]}


def test_the_portable_function_holds_no_newer_operators() -> None:
    model = make_model(SPARSE_LOOKUP, with_functions=True)
    function = next(function for function in model.functions if function.name == SPARSE_LOOKUP.name)
    for node in function.node:
        assert onnx.defs.get_schema(node.op_type, 18).since_version <= 18


REJECTIONS = {
    "tokens of h": ({"h": np.zeros((4, 20), np.float32)}, "dimension 0 of h (4) must be dimension 0 of x (5)"),
    "width of h": ({"h": np.zeros((5, 19), np.float32)}, "dimension 1 of h (19) must be dimension 1 of x (20)"),
    "tokens of tile_idx": (
        {"tile_idx": np.zeros((6, 2), np.int64)},
        "dimension 0 of tile_idx (6) must be dimension 0 of x",
    ),
    "tokens of score": ({"score": np.zeros((1, 3), np.float32)}, "dimension 0 of score (1) must be dimension 0 of x (5)"),
    "tiles of score": (
        {"score": np.zeros((5, 4), np.float32)},
        "dimension 1 of score (4) must be dimension 0 of direction",
    ),
    "rows of compress": ({"compress": np.zeros((21, 10), np.float32)}, "dimension 0 of compress (21) must be dimension 1 of x"),
    "compress_bias": ({"compress_bias": np.zeros(9, np.float32)}, "compress_bias (9) must be dimension 1 of compress (10)"),
    "point_weight": ({"point_weight": np.zeros((2, 9), np.float32)}, "point_weight (9) must be dimension 1 of compress (10)"),
    "rows of point_weight": ({"point_weight": np.zeros((3, 10), np.float32)}, "rows of point_weight (3) must be 2"),
    "point_bias": ({"point_bias": np.zeros(1, np.float32)}, "length of point_bias (1) must be 2"),
    "gate_curve": ({"gate_curve": np.ones(1, np.float32)}, "length of gate_curve (1) must be >= 2"),
    "tiles of splines": (
        {"splines": np.zeros((2, 289), np.float32)},
        "dimension 0 of splines (2) must be dimension 0 of",
    ),
    "size of splines": (
        {"splines": np.zeros((3, 288), np.float32)},
        "columns of splines (288) must be (grid_size + 1)^2 (289) for grid_size 16",
    ),
    "width of direction": (
        {"direction": np.zeros((3, 21), np.float32)},
        "dimension 1 of direction (21) must be dimension 1",
    ),
    "tile too large": ({"tile_idx": np.full((5, 2), 3)}, "tile_idx (3, at place 0) must be >= 0 and < the number of tiles (3)"),
    "tile negative": (
        {"tile_idx": np.array([[0, 1], [0, -1], [0, 0], [0, 0], [0, 0]])},
        "tile_idx (-1, at place 3) must be >= 0 and < the number of tiles (3)",
    ),
    "rank": ({"gate_curve": np.ones((2, 2), np.float32)}, "gate_curve"),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_wrong_inputs_are_rejected(case: str) -> None:
    changes, text = REJECTIONS[case]
    good, _, _ = lookup_inputs(np.random.default_rng(6), 5, 2, 3, 20, 10)
    session = native_session(make_model(SPARSE_LOOKUP, dims=UNKNOWN_RANKS))
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's InvalidArgument is no public name
        session.run(None, good | changes)
    assert "SparseLookup: " in str(failure.value)
    assert text in str(failure.value)
    assert type(failure.value).__name__ == "InvalidArgument"
    assert session.run(None, good)[0].shape == (5, 20)


def test_splines_of_the_other_kind_are_rejected() -> None:
    inputs, _, _ = lookup_inputs(np.random.default_rng(7), 5, 2, 3, 20, 10)
    session = native_session(make_model(SPARSE_LOOKUP, dims=UNKNOWN_RANKS, has_hinges=1))
    with pytest.raises(Exception, match=r"columns of splines \(289\) must be 4 grid_size \+ 1 \(65\) for grid_size 16"):
        session.run(None, inputs)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"grid_size": 0}, r"grid_size \(0\) must be >= 1 and <= 1048576"),
        ({"grid_size": 1 << 40}, r"grid_size \(1099511627776\) must be >= 1 and <= 1048576"),
        ({"has_hinges": 2}, r"has_hinges \(2\) must be 0 or 1"),
    ],
)
def test_wrong_attributes_are_rejected_when_the_session_is_made(attributes: dict[str, int], text: str) -> None:
    with pytest.raises(Exception, match=text):
        native_session(make_model(SPARSE_LOOKUP, **attributes))


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
def test_the_operator_of_torch_is_a_proper_one(kind: dict[str, int]) -> None:
    inputs, _, _ = lookup_inputs(np.random.default_rng(8), 5, 2, 3, 20, 10, **kind)
    torch.library.opcheck(sparse_lookup, (*map(torch.from_numpy, inputs.values()), 16, bool(kind["has_hinges"])))
