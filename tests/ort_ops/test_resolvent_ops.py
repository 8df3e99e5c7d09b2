"""ResolventSweep and ResolventMix in real sessions, by kernels and by functions: values, shapes, every rejection."""

from collections.abc import Callable

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import (
    make_model,
    mix_inputs,
    mix_reference,
    native_session,
    portable_session,
    sweep_inputs,
    sweep_reference,
)

from ort_ops.operators.resolvent_mix import RESOLVENT_MIX
from ort_ops.operators.resolvent_sweep import RESOLVENT_SWEEP
from ort_ops.schema import OpSchema

pytestmark = pytest.mark.usefixtures("native_library")

REFERENCES = {"ResolventSweep": sweep_reference, "ResolventMix": mix_reference}
MakeSession = Callable[[OpSchema], ort.InferenceSession]
OPS = (RESOLVENT_SWEEP, RESOLVENT_MIX)
few = settings(max_examples=40, deadline=None, derandomize=True)
axes = st.sets(st.integers(0, 2))


@pytest.fixture(scope="module", params=["native", "portable"])
def session_of(request: pytest.FixtureRequest) -> MakeSession:
    make = native_session if request.param == "native" else portable_session
    sessions = {op.name: make(make_model(op, dims=unknown_ranks(op), with_functions=True)) for op in OPS}
    return lambda op: sessions[op.name]


def unknown_ranks(op: OpSchema) -> dict[str, None]:
    """So that nothing is known but what the operator says itself."""
    return dict.fromkeys(tensor.name for tensor in op.inputs)


def assert_right(session: ort.InferenceSession, op: OpSchema, inputs: dict[str, np.ndarray]) -> None:
    expected = REFERENCES[op.name](inputs)
    size = max((np.abs(exact).max(initial=1.0) for exact in expected), default=1.0)
    for found, exact in zip(session.run(None, inputs), expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=0, atol=2e-5 * size)
        assert found.shape == exact.shape


@few
@given(seed=st.integers(0, 2**32 - 1), B=st.integers(0, 3), H=st.integers(0, 18), T=st.integers(0, 40))
def test_the_sweep_equals_float64(session_of: MakeSession, seed: int, B: int, H: int, T: int) -> None:
    assert_right(session_of(RESOLVENT_SWEEP), RESOLVENT_SWEEP, sweep_inputs(np.random.default_rng(seed), B, H, T))


@few
@given(
    seed=st.integers(0, 2**32 - 1),
    B=st.integers(0, 3),
    H=st.integers(0, 3),
    T=st.integers(0, 40),
    N=st.integers(1, 17),
    P=st.integers(0, 40),
    q_axes=axes,
    k_axes=axes,
)
def test_the_mix_equals_float64(
    session_of: MakeSession, seed: int, B: int, H: int, T: int, N: int, P: int, q_axes: set[int], k_axes: set[int]
) -> None:
    inputs = mix_inputs(np.random.default_rng(seed), B, H, T, N, P, q_axes, k_axes)
    assert_right(session_of(RESOLVENT_MIX), RESOLVENT_MIX, inputs)


def cut(inputs: dict[str, np.ndarray], start: int, end: int) -> dict[str, np.ndarray]:
    return {name: array if name.startswith("first") else array[:, :, start:end] for name, array in inputs.items()}


def test_a_text_in_two_pieces_has_the_bits_of_the_whole(session_of: MakeSession) -> None:
    rng = np.random.default_rng(0)
    sweep, mix = sweep_inputs(rng, 2, 3, 50), mix_inputs(rng, 2, 3, 50, 5, 11)
    whole_G, whole = session_of(RESOLVENT_SWEEP).run(None, sweep), session_of(RESOLVENT_MIX).run(None, mix)
    for place in (1, 17, 49):
        G = session_of(RESOLVENT_SWEEP).run(None, cut(sweep, 0, place))
        state = {f"first_{part}": array[:, :, -1] for part, array in zip(("re", "im"), G, strict=True)}
        rest_G = session_of(RESOLVENT_SWEEP).run(None, cut(sweep, place, 50) | state)
        for found, rest, expected in zip(G, rest_G, whole_G, strict=True):
            assert np.concatenate([found, rest], axis=2).tobytes() == expected.tobytes()
        *y, last_re, last_im = session_of(RESOLVENT_MIX).run(None, cut(mix, 0, place))
        rest_y = session_of(RESOLVENT_MIX).run(None, cut(mix, place, 50) | {"first_re": last_re, "first_im": last_im})
        for found, rest, expected in zip(y, rest_y[:2], whole[:2], strict=True):
            assert np.concatenate([found, rest], axis=2).tobytes() == expected.tobytes()
        assert all(found.tobytes() == expected.tobytes() for found, expected in zip(rest_y[2:], whole[2:], strict=True))


def test_ones_as_queries_and_keys_make_the_state_a_vector(session_of: MakeSession) -> None:
    inputs = mix_inputs(np.random.default_rng(1), 2, 3, 20, 1, 5, range(3), range(3))
    inputs["q"][:] = inputs["k"][:] = 1.0
    y_re, y_im, last_re, last_im = session_of(RESOLVENT_MIX).run(None, inputs)
    np.testing.assert_array_equal(last_re[:, :, 0], y_re[:, :, -1])
    np.testing.assert_array_equal(last_im[:, :, 0], y_im[:, :, -1])


def test_nan_stays_in_its_row_and_column(session_of: MakeSession) -> None:
    rng = np.random.default_rng(2)
    sweep, mix = sweep_inputs(rng, 2, 3, 9), mix_inputs(rng, 2, 3, 9, 4, 7)
    sweep["alpha_re"][1, 2, 4] = mix["u"][1, 2, 4, 3] = np.nan
    for G in session_of(RESOLVENT_SWEEP).run(None, sweep):
        assert np.isnan(G[1, 2, 4])
        G[1, 2] = 0.0
        assert np.isfinite(G).all()
    for y in session_of(RESOLVENT_MIX).run(None, mix)[:2]:
        assert np.isnan(y[1, 2, 4:, 3]).all()
        y[1, 2, 4:, 3] = 0.0
        assert np.isfinite(y).all()


@pytest.mark.parametrize("num_tokens", [1, 3, 700])
def test_threads_change_no_bit(num_tokens: int) -> None:
    rng = np.random.default_rng(num_tokens)
    sweep, mix = sweep_inputs(rng, 7, 9, num_tokens), mix_inputs(rng, 7, 9, num_tokens, 5, 16, {1}, {0, 1})
    for op, inputs in ((RESOLVENT_SWEEP, sweep), (RESOLVENT_MIX, mix)):
        one, two = (native_session(make_model(op), num_threads=count).run(None, inputs) for count in (1, 2))
        assert all(found.tobytes() == expected.tobytes() for found, expected in zip(one, two, strict=True))


def test_shapes_of_outputs_are_inferred() -> None:
    dims = {"u": [2, 3, "T", 6], "q": [2, 1, "T", 4], "k": [2, 1, "T", 4], "alpha_re": [2, 3, "T"]}
    inferred = {
        RESOLVENT_SWEEP: {"G_re": [2, 3, "T"], "G_im": [2, 3, "T"]},
        RESOLVENT_MIX: {"y_re": [2, 3, "T", 6], "y_im": [2, 3, "T", 6], "last_re": [2, 3, 4, 6], "last_im": [2, 3, 4, 6]},
    }
    for op, shapes in inferred.items():
        given = {tensor.name: dims[tensor.name] for tensor in op.inputs if tensor.name in dims}
        session = native_session(make_model(op, dims=given, output_shapes=False))
        assert {value.name: value.shape for value in session.get_outputs()} == shapes


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


U = "as u [2, 3, 5, 7] has it"
REJECTIONS = {
    "rank": (RESOLVENT_SWEEP, {"w": f32(2, 3)}, "rank of w (2, shape [2, 3]) must be 3 [B, H, T]"),
    "w": (RESOLVENT_SWEEP, {"w": f32(2, 3, 4)}, "shape of w [2, 3, 4] must be [2, 3, 5], as alpha_re [2, 3, 5] has it"),
    "alpha": (RESOLVENT_SWEEP, {"alpha_im": f32(1, 3, 5)}, "shape of alpha_im [1, 3, 5] must be [2, 3, 5], as alpha_re "),
    "first": (
        RESOLVENT_SWEEP,
        {"first_im": f32(3, 2)},
        "shape of first_im [3, 2] must be [2, 3], as alpha_re [2, 3, 5] has it",
    ),
    "G": (RESOLVENT_MIX, {"G_im": f32(2, 3, 1)}, f"shape of G_im [2, 3, 1] must be [2, 3, 5], {U}"),
    "c": (RESOLVENT_MIX, {"c_re": f32(2, 1, 5)}, f"shape of c_re [2, 1, 5] must be [2, 3, 5], {U}"),
    "heads of q": (RESOLVENT_MIX, {"q": f32(2, 2, 5, 4)}, f"axis 1 of q [2, 2, 5, 4] must be 1 or 3, {U}"),
    "tokens of k": (RESOLVENT_MIX, {"k": f32(2, 3, 0, 4)}, f"axis 2 of k [2, 3, 0, 4] must be 1 or 5, {U}"),
    "width": (RESOLVENT_MIX, {"q": f32(2, 1, 5, 3)}, "width of q [2, 1, 5, 3] must be that of k [2, 1, 5, 4]"),
    "no width": (RESOLVENT_MIX, {"q": f32(2, 1, 5, 0), "k": f32(1, 1, 5, 0)}, "width of k [1, 1, 5, 0] must be >= 1"),
    "state": (RESOLVENT_MIX, {"first_re": f32(2, 3, 7, 4)}, f"shape of first_re [2, 3, 7, 4] must be [2, 3, 4, 7], {U}"),
}


@pytest.mark.parametrize("case", REJECTIONS)
def test_a_wrong_size_is_refused(case: str) -> None:
    op, changes, text = REJECTIONS[case]
    rng = np.random.default_rng(0)
    good = sweep_inputs(rng, 2, 3, 5) if op is RESOLVENT_SWEEP else mix_inputs(rng, 2, 3, 5, 4, 7, {1}, {1})
    session = native_session(make_model(op, dims=unknown_ranks(op)))
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's InvalidArgument is no public name
        session.run(None, good | changes)
    assert f"{op.name}: {text}" in str(failure.value)
    assert type(failure.value).__name__ == "InvalidArgument"
    assert_right(session, op, good)
