"""SparseLookup in a real session, on the native and on the portable path: values and every rejection."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import lookup_inputs, lookup_keys, make_model, native_session, portable_session

from ort_ops.operators.sparse_lookup import SPARSE_LOOKUP
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")

TOKENS = ("x", "routing_x")
KINDS = [{"has_hinges": 0}, {"has_hinges": 1}]
UNKNOWN_RANKS = {tensor.name: None for tensor in SPARSE_LOOKUP.inputs}
ROUNDING = 1e-5  # of keys, whose size is a few units


def is_clear(key_TE: np.ndarray, top_k: int) -> np.ndarray:
    """Of each token: whether no two of its best top_k + 1 keys are nearly tied."""
    best = -np.sort(-key_TE, axis=1)[:, : top_k + 1]
    with np.errstate(invalid="ignore"):
        return ~(best[:, :-1] - best[:, 1:] <= ROUNDING).any(axis=1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.sampled_from([0, 1, 2, 23, 130]),
    top_k=st.integers(1, 3),
    more_tiles=st.integers(0, 40),
    width=st.one_of(st.integers(7, 70), st.integers(100, 300)),  # two nearly equal values have a norm that rounding changes
    num_hidden=st.integers(1, 80),
    grid_size=st.integers(1, 33),
    has_hinges=st.integers(0, 1),
    route_on_norm=st.integers(0, 1),
    epsilon=st.sampled_from([1e-5, 1e-3, 0.7]),
    is_constant=st.booleans(),
)
def test_all_paths_equal_the_reference(
    seed: int,
    num_tokens: int,
    top_k: int,
    more_tiles: int,
    width: int,
    num_hidden: int,
    grid_size: int,
    has_hinges: int,
    route_on_norm: int,
    epsilon: float,
    is_constant: bool,
) -> None:
    flags = {"has_hinges": has_hinges, "route_on_norm": route_on_norm, "epsilon": epsilon}
    sizes = (num_tokens, top_k, top_k + more_tiles, width, num_hidden, grid_size)
    inputs, y, tile_idx = lookup_inputs(np.random.default_rng(seed), *sizes, **flags)
    attributes = {"top_k": top_k, "grid_size": grid_size, **flags}
    constants = {name: array for name, array in inputs.items() if name not in TOKENS} if is_constant else {}
    model = make_model(SPARSE_LOOKUP, constants=constants, with_functions=True, **attributes)
    fed = {name: array for name, array in inputs.items() if name not in constants}
    answers = [session.run(None, fed) for session in (native_session(model), portable_session(model))]
    _, _, key = lookup_keys(inputs, route_on_norm, epsilon)
    is_same = is_clear(key, top_k)
    for actual_y, actual_idx in answers:
        assert (actual_y.dtype, actual_idx.dtype) == (np.float32, np.int64)
        assert (actual_y.shape, actual_idx.shape) == (y.shape, tile_idx.shape)
        np.testing.assert_array_equal(actual_idx[is_same], tile_idx[is_same])
        # A hinge may be as steep as its slope: what rounding does to the point grows with it.
        np.testing.assert_allclose(actual_y[is_same], y[is_same], rtol=0, atol=3e-5 * np.abs(y).max(initial=1.0))


@pytest.mark.parametrize("width", [0, 1])
def test_the_narrowest_layers(width: int) -> None:
    inputs, y, tile_idx = lookup_inputs(np.random.default_rng(0), 5, 2, 3, width, 4)
    actual = native_session(make_model(SPARSE_LOOKUP, top_k=2)).run(None, inputs)
    np.testing.assert_allclose(actual[0], y, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(actual[1], tile_idx)


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
def test_the_ends_of_plane_and_curve(kind: dict[str, int]) -> None:
    """Points at the border, gates at both ends, where the last cell and the last segment must be taken."""
    inputs, _, _ = lookup_inputs(np.random.default_rng(1), 4, 1, 1, 6, 2, 5, **kind)
    inputs["point_bias"] = np.zeros(2, np.float32)
    inputs["point_weight"] = np.array([[1e4, 0], [0, 1e4]], np.float32)
    inputs["compress"] = np.zeros((6, 2), np.float32)
    inputs["compress_bias"] = np.array([8.0, 9.0], np.float32)
    inputs["signatures"] = to_panels(np.array([[0, 1, 0, 0, 0, 0]], np.int8))
    inputs["routing_x"][:, 1] = [-1e30, 1e30, -200.0, 200.0]  # the scores
    spline = np.zeros((1, 21), np.float32) if kind["has_hinges"] else np.zeros((1, 36), np.float32)
    spline[0, -1] = 3.0  # the base, or the corner (1, 1)
    inputs["splines"] = spline
    model = make_model(SPARSE_LOOKUP, with_functions=True, grid_size=5, route_on_norm=0, **kind)
    for session in (native_session(model), portable_session(model)):
        size = 3.0 * inputs["gate_curve"][[0, -1, 0, -1], None]
        np.testing.assert_allclose(session.run(None, inputs)[0], inputs["x"] + size * inputs["direction"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
@pytest.mark.parametrize(("name", "route_on_norm"), [("x", 1), ("x", 0), ("routing_x", 0)])
def test_nan_stays_with_its_token(name: str, route_on_norm: int, kind: dict[str, int]) -> None:
    flags = {"route_on_norm": route_on_norm, **kind}
    inputs, y, _ = lookup_inputs(np.random.default_rng(2), 30, 1, 3, 20, 30, **flags)
    inputs[name][7, 3] = np.nan
    actual = native_session(make_model(SPARSE_LOOKUP, **flags)).run(None, inputs)[0]
    assert np.isnan(actual[7]).all()
    others = np.arange(30) != 7
    np.testing.assert_allclose(actual[others], y[others], rtol=0, atol=1e-5 * np.abs(y).max())


def test_what_the_signatures_do_not_read_counts_for_nothing() -> None:
    inputs, y, _ = lookup_inputs(np.random.default_rng(3), 5, 1, 4, 9, 4)
    inputs["routing_x"][:] = np.nan
    model = make_model(SPARSE_LOOKUP, with_functions=True)
    for session in (native_session(model), portable_session(model)):
        np.testing.assert_allclose(session.run(None, inputs)[0], y, rtol=0, atol=1e-5 * np.abs(y).max())


@pytest.mark.parametrize("kind", KINDS, ids=["grid", "hinges"])
def test_results_depend_neither_on_threads_nor_on_the_other_tokens(kind: dict[str, int]) -> None:
    inputs, _, _ = lookup_inputs(np.random.default_rng(4), 151, 2, 40, 70, 100, **kind)
    model = make_model(SPARSE_LOOKUP, top_k=2, **kind)
    one, many = (native_session(model, num_threads=threads).run(None, inputs) for threads in (1, 5))
    for a, b in zip(one, many, strict=True):
        np.testing.assert_array_equal(a, b, strict=True)
    of_token = {name: inputs[name][50:51] for name in TOKENS}
    for a, b in zip(native_session(model).run(None, inputs | of_token), one, strict=True):
        np.testing.assert_array_equal(a, b[50:51])


def test_shapes_are_inferred() -> None:
    model = make_model(SPARSE_LOOKUP, output_shapes=False, dims={"x": ["T", 8], "routing_x": ["T", 8]}, top_k=2)
    outputs = {value.name: value.shape for value in native_session(model).get_outputs()}
    assert outputs == {"y": ["T", 8], "tile_idx": ["T", 2]}


def test_the_portable_function_holds_no_newer_operators() -> None:
    model = make_model(SPARSE_LOOKUP, with_functions=True)
    function = next(function for function in model.functions if function.name == SPARSE_LOOKUP.name)
    for node in function.node:
        assert node.domain or onnx.defs.get_schema(node.op_type, 18).since_version <= 18


REJECTIONS = {
    "tokens of routing_x": (
        {"routing_x": np.zeros((4, 20), np.float32)},
        "dimension 0 of routing_x (4) must be dimension 0 of x (5)",
    ),
    "width of routing_x": (
        {"routing_x": np.zeros((5, 19), np.float32)},
        "dimension 1 of routing_x (19) must be dimension 1 of x (20)",
    ),
    "norm_weight": ({"norm_weight": np.zeros(19, np.float32)}, "dimension 0 of norm_weight (19) must be dimension 1 of x (20)"),
    "norm_bias": ({"norm_bias": np.zeros(21, np.float32)}, "dimension 0 of norm_bias (21) must be dimension 1 of x (20)"),
    "panels of signatures": (
        {"signatures": to_panels(np.zeros((33, 20), np.int8))},
        "shape of signatures [2, 2, 128] must end in",
    ),
    "rows of signatures": (
        {"signatures": to_panels(np.ones((4, 20), np.int8))},
        "signatures must hold 0 (code 01) past the last of 3 rows",
    ),
    "codes of signatures": ({"signatures": np.full((1, 2, 128), 0xFF, np.uint8)}, "must hold only the codes 00, 01 and 10"),
    "tiles of bias": ({"bias": np.zeros(4, np.float32)}, "dimension 0 of bias (4) must be dimension 0 of direction (3)"),
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
    "rank": ({"gate_curve": np.ones((2, 2), np.float32)}, "gate_curve"),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_wrong_inputs_are_rejected(case: str) -> None:
    changes, text = REJECTIONS[case]
    good, _, _ = lookup_inputs(np.random.default_rng(6), 5, 2, 3, 20, 10)
    session = native_session(make_model(SPARSE_LOOKUP, dims=UNKNOWN_RANKS, top_k=2, route_on_norm=0))
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


def test_there_must_be_as_many_tiles_as_a_token_goes_to() -> None:
    inputs, _, _ = lookup_inputs(np.random.default_rng(7), 5, 2, 3, 20, 10)
    session = native_session(make_model(SPARSE_LOOKUP, top_k=4))
    with pytest.raises(Exception, match=r"top_k \(4\) must be <= the number of tiles in bias \(3\)"):
        session.run(None, inputs)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"grid_size": 0}, r"grid_size \(0\) must be >= 1 and <= 1048576"),
        ({"grid_size": 1 << 40}, r"grid_size \(1099511627776\) must be >= 1 and <= 1048576"),
        ({"has_hinges": 2}, r"has_hinges \(2\) must be 0 or 1"),
        ({"route_on_norm": -1}, r"route_on_norm \(-1\) must be 0 or 1"),
        ({"top_k": 0}, r"top_k \(0\) must be >= 1"),
        ({"epsilon": -0.5}, r"epsilon \(-0.5\) must be >= 0"),
        ({"epsilon": 1}, r"attribute epsilon must be a float, it has another type"),
    ],
)
def test_wrong_attributes_are_rejected_when_the_session_is_made(attributes: dict[str, int], text: str) -> None:
    with pytest.raises(Exception, match=text):
        native_session(make_model(SPARSE_LOOKUP, **attributes))
