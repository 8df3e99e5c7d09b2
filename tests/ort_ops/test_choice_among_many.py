"""Among many tiles SignatureRoute scores in 8 bits first. The choice must be that of the exact scores, bit for bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import make_model, native_session, random_ternary, route_inputs, score_reference

from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")

MANY = 256  # from so many tiles on


def both_ways(inputs: dict[str, np.ndarray], top_k: int, num_threads: int = 1) -> list[list[np.ndarray]]:
    """tile_idx and weight, by the scores of all tiles, and by those of a few."""
    models = [make_model(SIGNATURE_ROUTE, top_k=top_k, gate=0, left_out=left_out) for left_out in ((), ("score",))]
    sessions = [native_session(model, num_threads=num_threads) for model in models]
    return [session.run(["tile_idx", "weight"], inputs) for session in sessions]


def assert_same(inputs: dict[str, np.ndarray], top_k: int, num_threads: int = 1) -> None:
    exact, fine = both_ways(inputs, top_k, num_threads)
    np.testing.assert_array_equal(fine[0], exact[0], strict=True)
    np.testing.assert_array_equal(fine[1], exact[1], strict=True)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.sampled_from([0, 1, 3, 65]),
    num_tiles=st.sampled_from([MANY - 1, MANY, MANY + 1, 1000]),
    width=st.sampled_from([1, 5, 16, 130, 700]),
    top_k=st.sampled_from([1, 2, 7]),
    size=st.sampled_from([1e-37, 1e-31, 1e-20, 1.0, 1e18, 1e36]),
    kind=st.sampled_from(["plain", "outliers", "heavy", "sparse", "clustered", "massive", "denormals"]),
    bias=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_the_choice_is_that_of_the_exact_scores(
    seed: int, num_tokens: int, num_tiles: int, width: int, top_k: int, size: float, kind: str, bias: float
) -> None:
    rng = np.random.default_rng(seed)
    inputs, _ = route_inputs(rng, num_tokens, num_tiles, width)
    x = inputs["x"]
    if kind == "outliers":
        x[:, ::7] *= 100
    elif kind == "heavy":
        x = rng.standard_t(1, x.shape).astype(np.float32).clip(-100, 100)
    elif kind == "sparse":
        x *= rng.random(x.shape) < 0.05
    elif kind == "clustered":
        x = x[:1].repeat(num_tokens, axis=0) + np.float32(1e-5) * x
    elif kind == "massive":  # half of the columns, in some tokens
        x[::2, ::2] *= np.float32(1e6)
    with np.errstate(over="ignore"):
        if kind == "denormals":
            x = x * np.where(rng.random(x.shape) < 0.3, 1e-40 / size, 1.0)
        inputs["x"] = (x * np.float64(size)).astype(np.float32)
    inputs["bias"] *= np.float32(bias)
    assert_same(inputs, top_k)


def test_a_wide_token_chooses_by_what_24_bits_leave_of_it() -> None:
    """Its huge activation meets no signature, and the 24 bits that remain of the others would choose another tile."""
    rng = np.random.default_rng(3)
    signatures = random_ternary(rng, 300, 120)
    signatures[:, 0] = 0
    inputs, _ = route_inputs(rng, 40, 300, 120)
    inputs |= {"signatures": to_panels(signatures), "bias": np.zeros(300, np.float32)}
    inputs["x"][:, 0] = 1e8
    assert_same(inputs, 3)
    best = score_reference(inputs, signatures).argmax(-1)
    np.testing.assert_array_equal(both_ways(inputs, 1)[1][0][:, 0], best)


@pytest.mark.parametrize("size", [1e30, 1e36, 3e38])
def test_where_sums_leave_float32_the_choice_is_the_same(size: float) -> None:
    for seed in range(8):
        inputs, _ = route_inputs(np.random.default_rng(seed), 9, 300, 130)
        inputs["x"][:, ::7] *= 100
        inputs["x"] = (inputs["x"] / np.abs(inputs["x"]).max() * np.float64(size)).astype(np.float32)
        assert_same(inputs, 3)
        inputs["bias"][::3] = 3.4e38
        assert_same(inputs, 3)


def test_a_bound_that_is_a_little_too_small_would_be_noticed() -> None:
    """The rest of rounding points along one signature: its score is as far off as the bound allows, one against it wins."""
    rng = np.random.default_rng(0)
    side_N = rng.choice([-1, 1], 100)
    q_N = np.zeros(100)
    q_N[:44] = -side_N[:44]
    x = np.concatenate([[127.0], q_N + 0.45 * side_N]).astype(np.float32)[None]  # scale 1, and 0.45 left in every column
    signatures = np.zeros((MANY, 101), np.int8)
    signatures[200, 1:], signatures[3, 1:] = side_N, -side_N
    bias = np.full(MANY, -1000, np.float32)
    bias[[3, 200]] = 0
    inputs = {"x": x, "signatures": to_panels(signatures), "bias": bias, "log_mass": np.zeros(MANY, np.float32)}
    exact, fine = both_ways(inputs, 1)
    assert exact[0].item() == fine[0].item() == 200


def test_ties_nan_infinity_and_free_slots() -> None:
    rng = np.random.default_rng(1)
    inputs, _ = route_inputs(rng, 12, 400, 96)
    inputs["bias"][:] = 0
    inputs["signatures"][4:8] = inputs["signatures"][:4]  # 128 pairs of equal tiles
    inputs["x"][1, 3], inputs["x"][2, 5], inputs["x"][3] = np.nan, np.inf, 0
    for free in ([], [0, 5, 17], range(399), range(400)):
        inputs["bias"][list(free)] = -np.inf
        assert_same(inputs, 3)
    inputs["bias"][:] = 0
    inputs["bias"][7], inputs["bias"][9] = np.nan, np.inf
    assert_same(inputs, 3)


def test_threads_and_constants_change_nothing() -> None:
    rng = np.random.default_rng(2)
    inputs, _ = route_inputs(rng, 150, 512, 256)
    assert_same(inputs, 2, num_threads=3)
    constants = {name: inputs.pop(name) for name in ("signatures", "bias", "log_mass")}
    model = make_model(SIGNATURE_ROUTE, constants=constants, gate=0, left_out=("score",))
    constant = native_session(model).run(["tile_idx", "weight"], inputs)
    exact, _ = both_ways(inputs | constants, 1)
    np.testing.assert_array_equal(constant[0], exact[0])
    np.testing.assert_array_equal(constant[1], exact[1])
