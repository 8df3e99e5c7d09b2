"""The gates of SignatureRoute: the kernel, the function in standard ONNX and a float64 reference say the same."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import make_model, native_session, portable_session, rank_tiles, route_inputs, run_route, weight_reference

from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")
SIGMOID, SOFTMAX, ADAPTIVE = GATES = range(3)
Inputs = dict[str, np.ndarray]
MakeSession = Callable[[onnx.ModelProto], ort.InferenceSession]


def run_both(inputs: Inputs, **attributes: object) -> list[tuple[np.ndarray, ...]]:
    """tile_idx, weight and score of the kernel and of the function."""
    model = make_model(SIGNATURE_ROUTE, with_functions=True, **attributes)
    return [tuple(session(model).run(None, inputs)) for session in (native_session, portable_session)]


def of_scores(score_TE: np.ndarray, **others: np.ndarray) -> Inputs:
    """Inputs whose scores are these: each tile looks at one dimension."""
    num_tiles = score_TE.shape[1]
    zeros_E = np.zeros(num_tiles, np.float32)
    inputs = {"x": score_TE.astype(np.float32), "signatures": to_panels(np.eye(num_tiles, dtype=np.int8))}
    return inputs | {"bias": zeros_E, "log_mass": zeros_E} | others


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 20),
    num_tiles=st.integers(1, 40),
    num_columns=st.integers(1, 70),
    share_of_k=st.floats(0.0, 1.0),
    gate=st.sampled_from(GATES),
    threshold=st.floats(0.0, 3.0, width=32),
    share_free=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_kernel_and_function_equal_the_reference(
    seed: int,
    num_tokens: int,
    num_tiles: int,
    num_columns: int,
    share_of_k: float,
    gate: int,
    threshold: float,
    share_free: float,
) -> None:
    rng = np.random.default_rng(seed)
    inputs, _ = route_inputs(rng, num_tokens, num_tiles, num_columns)
    inputs["bias"][rng.random(num_tiles) < share_free] = -np.inf
    inputs["bias"][rng.integers(num_tiles)] = 0.1  # one at least is in use
    top_k = 1 + round(share_of_k * (num_tiles - 1))
    for tile_idx, weight, score in run_both(inputs, top_k=top_k, gate=gate, confidence_threshold=threshold):
        np.testing.assert_array_equal(tile_idx, rank_tiles(score + inputs["bias"], top_k))
        expected = weight_reference(score, tile_idx, inputs, gate, threshold)
        np.testing.assert_allclose(weight, expected, rtol=3e-6, atol=1e-30)
        assert (weight.shape, weight.dtype) == (tile_idx.shape, np.float32)


@pytest.mark.parametrize("make_session", [native_session, portable_session])
def test_a_tile_at_the_threshold_is_used_and_one_beyond_it_is_not(make_session: MakeSession) -> None:
    inputs = of_scores(np.array([[2.0, 1.75, 1.5, -1.0], [1.0, 1.0, 1.0, 1.0]]))

    def run(threshold: float) -> list[np.ndarray]:
        model = make_model(SIGNATURE_ROUTE, with_functions=True, top_k=3, gate=ADAPTIVE, confidence_threshold=threshold)
        return make_session(model).run(None, inputs)

    best, second, *_ = run(0.0)[2][0]  # the scores to the bit
    at, below = best - second, np.nextafter(best - second, np.float32(0))
    for threshold, is_used in ((at, [True, True, False]), (below, [True, False, False])):
        tile_idx, weight, _ = run(float(threshold))
        np.testing.assert_array_equal(tile_idx, [[0, 1, 2]] * 2)
        np.testing.assert_array_equal(weight != 0, [is_used, [True] * 3])
        np.testing.assert_allclose(weight.sum(1), 1, rtol=1e-6)


def test_adaptive_k_counts_by_score_and_chooses_by_bias() -> None:
    """The tile of the bias is far below the best score, and no weight becomes 0 / 0."""
    inputs = of_scores(np.array([[300.0, 299.9, 0.0]]), bias=np.array([0, 0, 1000], np.float32))
    for tile_idx, weight, _ in run_both(inputs, top_k=2, gate=ADAPTIVE):
        np.testing.assert_array_equal(tile_idx, [[2, 0]])
        np.testing.assert_array_equal(weight, [[0, 1]])
    for _, weight, _ in run_both(inputs, top_k=1, gate=ADAPTIVE):
        np.testing.assert_array_equal(weight, [[1]])


@pytest.mark.parametrize("gate", GATES)
def test_free_slots_are_chosen_last_and_count_for_nothing(gate: int) -> None:
    score_TE, free_E = np.array([[1.0, 9.0, 2.0]]), np.array([0, -np.inf, 0], np.float32)
    without = of_scores(np.array([[1.0, 2.0]]))
    scale = 1.5**0.5 if gate == SOFTMAX else 1.0  # sqrt(E)
    pairs = zip(
        run_both(of_scores(score_TE, bias=free_E), top_k=3, gate=gate), run_both(without, top_k=2, gate=gate), strict=True
    )
    for (tile_idx, weight, score), (_, expected, _) in pairs:
        np.testing.assert_array_equal(tile_idx, [[2, 0, 1]])
        np.testing.assert_allclose(score, score_TE, rtol=1e-6)
        np.testing.assert_allclose(weight[:, :2], expected * np.float32(scale), rtol=1e-6)
        assert weight[0, 2] == 0


@pytest.mark.parametrize("gate", GATES)
def test_a_token_of_nan_has_weights_of_nan_and_others_do_not(gate: int) -> None:
    inputs, _ = route_inputs(np.random.default_rng(0), 3, 5, 20)
    inputs["x"][1, 3] = np.nan
    inputs["bias"][0] = -np.inf  # and so is that of a free slot, which is chosen where no number is left
    for tile_idx, weight, _ in run_both(inputs, top_k=2, gate=gate):
        np.testing.assert_array_equal(tile_idx[1], [0, 1])
        np.testing.assert_array_equal(np.isnan(weight), [[False] * 2, [True] * 2, [False] * 2])


@pytest.mark.parametrize(("gate", "expected"), [(SIGMOID, 0.0), (SOFTMAX, np.nan), (ADAPTIVE, np.nan)])
def test_where_all_slots_are_free_no_tile_counts(gate: int, expected: float) -> None:
    inputs = of_scores(np.ones((2, 3)), bias=np.full(3, -np.inf, np.float32))
    for tile_idx, weight, _ in run_both(inputs, top_k=2, gate=gate):
        np.testing.assert_array_equal(tile_idx, [[0, 1]] * 2)
        np.testing.assert_array_equal(weight, np.full((2, 2), expected, np.float32))


def test_mass_counts_in_the_sum_alone() -> None:
    """Two tiles of half the mass, which agree, are as one."""
    one = of_scores(np.array([[1.0, 0.5]]))
    score_TE, log_mass_E = np.array([[1.0, 0.5, 1.0]]), np.log([0.5, 1.0, 0.5]).astype(np.float32)
    pairs = zip(run_both(of_scores(score_TE, log_mass=log_mass_E)), run_both(one), strict=True)
    for (_, weight, _), (_, expected, _) in pairs:
        np.testing.assert_allclose(weight, expected * np.float32(1.5**0.5), rtol=1e-6)


def test_scores_far_apart_and_large_stay_numbers() -> None:
    score_TE = np.array([[1e4, -1e4, 9999.0], [-1e30, -1e30, -1e30]])
    for gate in GATES:
        for tile_idx, weight, score in run_both(of_scores(score_TE), top_k=3, gate=gate):
            shifted = score - score.max(1, keepdims=True)
            if gate != SIGMOID:
                expected = weight_reference(shifted, tile_idx, of_scores(score_TE), gate)
                np.testing.assert_allclose(weight, expected, rtol=1e-6, atol=1e-30)
            assert np.isfinite(weight).all()


def test_softmax_is_the_default_and_the_threshold_0_3() -> None:
    inputs, _ = route_inputs(np.random.default_rng(1), 9, 6, 10)
    for name, attributes in {"gate": {}, "threshold": {"gate": ADAPTIVE}}.items():
        full = {"gate": SOFTMAX, "confidence_threshold": 0.3} | attributes
        for got, expected in zip(run_both(inputs, top_k=2, **attributes), run_both(inputs, top_k=2, **full), strict=True):
            np.testing.assert_array_equal(got[1], expected[1], err_msg=name)


@pytest.mark.parametrize("make_session", [native_session, portable_session])
def test_a_node_may_leave_the_scores_out(make_session: MakeSession) -> None:
    inputs, _ = route_inputs(np.random.default_rng(2), 9, 6, 10)
    model = make_model(SIGNATURE_ROUTE, with_functions=True, left_out=["score"], top_k=2)
    got = make_session(model).run(None, inputs)
    assert len(got) == 2
    whole = make_session(make_model(SIGNATURE_ROUTE, with_functions=True, top_k=2)).run(None, inputs)
    for one, other in zip(got, whole, strict=False):
        np.testing.assert_array_equal(one, other)


def test_the_kernels_weights_do_not_depend_on_threads() -> None:
    inputs, _ = route_inputs(np.random.default_rng(3), 500, 100, 30)
    for gate in GATES:
        one, many = (run_route(inputs, 3, num_threads=n, gate=gate)[1] for n in (1, 3))
        np.testing.assert_array_equal(one, many)


REJECTIONS = {
    "gate": ({"gate": 3}, "gate (3) must be 0 (sigmoid), 1 (softmax) or 2 (adaptive)"),
    "negative gate": ({"gate": -1}, "gate (-1) must be 0 (sigmoid), 1 (softmax) or 2 (adaptive)"),
    "gate of another type": ({"gate": 1.0}, "attribute gate must be an integer, it has another type"),
    "threshold": ({"confidence_threshold": -0.5}, "confidence_threshold (-0.5) must be >= 0"),
    "threshold of NaN": ({"confidence_threshold": float("nan")}, "confidence_threshold (nan) must be >= 0"),
    "threshold of another type": (
        {"confidence_threshold": 1},
        "attribute confidence_threshold must be a float, it has another",
    ),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_wrong_attributes_are_rejected_when_the_session_is_made(case: str) -> None:
    attributes, text = REJECTIONS[case]
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's exceptions are no public names
        native_session(make_model(SIGNATURE_ROUTE, **attributes))
    assert text in str(failure.value)
