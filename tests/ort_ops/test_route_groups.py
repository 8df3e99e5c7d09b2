"""SignatureRoute with several groups of tiles: each group is routed as if it were alone, to the bit."""

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import grouped_route_inputs, make_model, native_session, portable_session, run_route

from ort_ops.operators.signature_route import GATES, SIGNATURE_ROUTE

pytestmark = pytest.mark.usefixtures("native_library")
MAKE_SESSION = [native_session, portable_session]
MakeSession = Callable[[onnx.ModelProto], ort.InferenceSession]


def side_by_side(outputs: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [np.concatenate(of_groups, axis=1) for of_groups in zip(*outputs, strict=True)]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 70),
    num_groups=st.integers(1, 5),
    num_tiles=st.integers(1, 70),
    num_columns=st.integers(0, 70),
    share_of_k=st.floats(0.0, 1.0),
    gate=st.sampled_from(GATES),
    is_constant=st.booleans(),
)
def test_groups_are_routed_as_if_each_were_alone(
    seed: int,
    num_tokens: int,
    num_groups: int,
    num_tiles: int,
    num_columns: int,
    share_of_k: float,
    gate: int,
    is_constant: bool,
) -> None:
    rng = np.random.default_rng(seed)
    joined, groups = grouped_route_inputs(rng, num_tokens, num_groups, num_tiles, num_columns)
    top_k = 1 + round(share_of_k * (num_tiles - 1))
    attributes = {"top_k": top_k, "gate": gate}
    constants = {name: joined[name] for name in joined if name != "x"} if is_constant else {}
    inputs = {name: joined[name] for name in joined if name not in constants}
    for make_session in MAKE_SESSION:
        alone = make_session(make_model(SIGNATURE_ROUTE, with_functions=True, **attributes))
        together = make_session(
            make_model(SIGNATURE_ROUTE, with_functions=True, constants=constants, num_groups=num_groups, **attributes)
        )
        expected = side_by_side([alone.run(None, group) for group in groups])
        for got, value in zip(together.run(None, inputs), expected, strict=True):
            if make_session is native_session:
                np.testing.assert_array_equal(got, value)
            else:  # the order of summation is onnxruntime's own
                np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-5)


def test_groups_without_scores_are_routed_alike() -> None:
    for num_tiles in (20, 300):  # from 256 on one group alone would be scored in 8 bits first
        joined, groups = grouped_route_inputs(np.random.default_rng(1), 5, 3, num_tiles, 40)
        model = make_model(SIGNATURE_ROUTE, left_out=["score"], top_k=2, gate=0, num_groups=3)
        expected = side_by_side([list(run_route(group, 2, gate=0))[:2] for group in groups])
        for got, value in zip(native_session(model).run(None, joined), expected, strict=True):
            np.testing.assert_array_equal(got, value)


def test_what_stands_between_groups_is_not_read() -> None:
    joined, _ = grouped_route_inputs(np.random.default_rng(2), 3, 2, 5, 16)
    panels = joined["signatures"].copy()
    panels[0, 0, 5 * 4 :] = 0xAA  # 1 in each dimension: the best of all tiles, were it one
    changed = joined | {"signatures": panels}
    model = make_model(SIGNATURE_ROUTE, with_functions=True, top_k=5, num_groups=2)
    for make_session in MAKE_SESSION:
        session = make_session(model)
        for got, expected in zip(session.run(None, changed), session.run(None, joined), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_groups_do_not_depend_on_threads() -> None:
    joined, _ = grouped_route_inputs(np.random.default_rng(3), 300, 4, 20, 30)
    one, many = (run_route(joined, 3, num_threads=n, num_groups=4) for n in (1, 3))
    for first, second in zip(one, many, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("make_session", MAKE_SESSION)
@pytest.mark.parametrize("num_groups", [0, -1, -2, 3, 2**62])
def test_a_wrong_number_of_groups_is_refused(make_session: MakeSession, num_groups: int) -> None:
    joined, _ = grouped_route_inputs(np.random.default_rng(4), 3, 2, 4, 16)
    model = make_model(SIGNATURE_ROUTE, with_functions=True, num_groups=num_groups)
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's exceptions are no public names
        make_session(model).run(None, joined)
    if make_session is native_session:
        rule = f"num_groups ({num_groups}) must be >= 1"
        if num_groups > 0:
            rule = f"the number of tiles in bias (8) must be a multiple of num_groups ({num_groups})"
        assert rule in str(failure.value)


def test_a_group_must_have_top_k_tiles_and_its_own_panels() -> None:
    joined, _ = grouped_route_inputs(np.random.default_rng(5), 3, 2, 4, 16)
    with pytest.raises(Exception, match=r"top_k \(5\) must be <= the number of tiles in a group \(4\)"):
        run_route(joined, 5, num_groups=2)
    one_panel = joined | {"signatures": joined["signatures"][:1]}
    with pytest.raises(Exception, match=r"shape of signatures \[1, 1, 128\] must end in .* = \[2, 1, 128\] for 64 rows"):
        run_route(one_panel, 1, num_groups=2)
