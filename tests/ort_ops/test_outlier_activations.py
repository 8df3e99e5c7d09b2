"""Activations of 24 bits where a few are far larger than the rest: what 24 bits lose, and the tokens that are multiplied again.

Groups of 128 columns share a scale, so that a huge activation takes bits from the others of its group even where its own weight
is 0. Tokens in which that costs too much are wide: what 24 bits leave of them is quantised and multiplied in its turn.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import (
    ffn_inputs,
    lookup_inputs,
    make_model,
    native_session,
    portable_session,
    random_ternary,
    rank_tiles,
    route_inputs,
    run_route,
    score_reference,
    tile_matmul_inputs,
    tile_matmul_reference,
)

from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.sparse_lookup import SPARSE_LOOKUP
from ort_ops.operators.ternary_ffn import TERNARY_FFN
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import to_panels

pytestmark = pytest.mark.usefixtures("native_library")

Levels = tuple[tuple[float, float], ...]
# (fraction, share): a group is wide if more than the share of its activations lie below the fraction of its largest.
SCORES: Levels = ((2.0**-8, 1 / 4), (2.0**-12, 1 / 32), (2.0**-19, 0.0))
PRODUCTS: Levels = ((2.0**-12, 1 / 4),)
LEVELS = np.float32(127 * (256**2 + 256 + 1))
ROUNDING = 2.0**-24
SMALLEST = 2.0**-100  # activations below it count as zeros


def groups_of(x_TK: np.ndarray, group_size: int = 128) -> np.ndarray:
    num_tokens, num_columns = x_TK.shape
    size = group_size or num_columns
    num_groups = -(-num_columns // size)
    return np.pad(x_TK, ((0, 0), (0, size * num_groups - num_columns))).reshape(num_tokens, num_groups, size)


def is_wide(x_TK: np.ndarray, levels: Levels, group_size: int = 128) -> np.ndarray:
    size_TGC = np.abs(groups_of(x_TK, group_size)).astype(np.float64)
    largest_TG1 = size_TGC.max(-1, keepdims=True)
    counts_TGC = size_TGC >= SMALLEST
    wide_TG = np.zeros(size_TGC.shape[:2], bool)
    for fraction, share in levels:
        num_below_TG = (counts_TGC & (size_TGC < fraction * largest_TG1)).sum(-1)
        wide_TG |= num_below_TG > share * counts_TGC.sum(-1)
    return wide_TG.any(-1)


def error_bound(x_TK: np.ndarray, weight_NK: np.ndarray, levels: Levels, group_size: int = 128) -> np.ndarray:
    """What the operator states, for rows of scale 1 [T, N]: float32's rounding, plus m 2^-23 for each weight of a group whose
    largest activation is m, unless the token is wide."""
    size_TK, used_NK = np.abs(x_TK).astype(np.float64), np.abs(weight_NK).astype(np.float64)
    largest_TG = groups_of(size_TK, group_size).max(-1)
    num_used_NG = groups_of(used_NK, group_size).sum(-1)
    rounding = 2 * (3 * largest_TG.shape[1] + 2) * ROUNDING * (size_TK @ used_NK.T) + SMALLEST * num_used_NG.sum(-1)
    return rounding + np.where(is_wide(x_TK, levels, group_size)[:, None], 0, 2.0**-23 * largest_TG @ num_used_NG.T)


def plain_product(x_TK: np.ndarray, weight_NK: np.ndarray, scale_N: np.ndarray) -> np.ndarray:
    """The product of 24 bits alone, bit for bit: the kernels' contracts, three planes a group, float32 from left to right."""
    x_TGC, weight_NGC = groups_of(x_TK), groups_of(weight_NK).astype(np.int64)
    total_TN = np.zeros((len(x_TK), len(weight_NK)), np.float32)
    for g in range(x_TGC.shape[1]):
        largest_T1 = np.abs(x_TGC[:, g]).max(-1, keepdims=True)
        rest_TC = np.rint(x_TGC[:, g] * (np.float64(LEVELS) / largest_T1.astype(np.float64))).astype(np.int64)
        digits = []
        for _ in range(2):
            digits.append((rest_TC + 128) % 256 - 128)
            rest_TC = (rest_TC - digits[-1]) // 256
        for plane, digit_TC in enumerate([rest_TC, *reversed(digits)]):
            scale_T1 = largest_T1 / LEVELS * np.float32(256.0 ** (2 - plane))
            total_TN += (digit_TC @ weight_NGC[:, g].T).astype(np.float32) * scale_T1
    return scale_N * total_TN


KINDS = ["one", "half", "most", "all but one", "some tokens", "heavy tails", "all sizes", "denormals"]


def rows(rng: np.random.Generator, kind: str, num_tokens: int, width: int) -> np.ndarray:
    x = rng.standard_normal((num_tokens, width))
    big = x * 10.0 ** rng.uniform(1, 8, (num_tokens, 1))
    share = {"half": 0.5, "most": 7 / 8}
    if kind in share:
        x = np.where(rng.random(x.shape) < share[kind], big, x)
    elif kind in ("one", "all but one"):
        is_chosen = np.arange(width) == rng.integers(0, width, (num_tokens, 1))
        x = np.where(is_chosen == (kind == "one"), big, x)
    elif kind == "some tokens":
        x[::3, ::2] *= 1e6
    elif kind == "heavy tails":
        x = rng.standard_t(1, x.shape)
    elif kind == "all sizes":
        x *= 10.0 ** rng.uniform(-8, 8, x.shape)
    else:
        x[rng.random(x.shape) < 0.3] *= 1e-40
    return x.astype(np.float32)


def rows_of_weights(rng: np.random.Generator, x_TK: np.ndarray, num_rows: int) -> np.ndarray:
    """Dense and sparse random rows; the first three meet only the small activations of the first token, or only the large."""
    width = x_TK.shape[1]
    weight = random_ternary(rng, num_rows, width)
    weight[::2] *= rng.random((len(weight[::2]), width)) < 0.1
    is_small = np.abs(x_TK[0]) < np.abs(x_TK[0]).max() / 50
    weight[0], weight[1] = is_small, np.where(is_small, 0, rng.choice([-1, 1], width))
    weight[2] = np.arange(width) == np.abs(x_TK[0]).argmin()
    return weight


@pytest.mark.parametrize("size", [1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e30])
def test_a_large_activation_of_weight_0_does_not_spoil_the_others(size: float) -> None:
    """The error stays within four times that of the function in float32, or of one rounding."""
    x = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    x[0, 0] = size
    signatures = np.ones((2, 64), np.int8) * np.array([[1], [-1]], np.int8)
    signatures[:, 0] = 0
    zeros = np.zeros(2, np.float32)
    inputs = {"x": x, "signatures": to_panels(signatures), "bias": zeros, "log_mass": zeros}
    model = make_model(SIGNATURE_ROUTE, with_functions=True)
    exact = score_reference(inputs, signatures)
    native, portable = (session(model).run(None, inputs) for session in (native_session, portable_session))
    error, own = (np.abs(score - exact).max() for *_, score in (native, portable))
    assert error <= 4 * max(own, ROUNDING * np.abs(exact).max())
    np.testing.assert_array_equal(native[0], portable[0])


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from(KINDS),
    num_tokens=st.integers(1, 40),
    num_rows=st.integers(3, 70),
    width=st.sampled_from([1, 5, 17, 64, 130, 300, 700]),
    group_size=st.sampled_from([0, 128]),
)
def test_scores_and_products_keep_the_bound_for_every_row_of_weights(
    seed: int, kind: str, num_tokens: int, num_rows: int, width: int, group_size: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rows(rng, kind, num_tokens, width)
    weight = rows_of_weights(rng, x, num_rows)
    inputs, _ = route_inputs(rng, num_tokens, num_rows, width)
    inputs |= {"x": x, "signatures": to_panels(weight)}
    score = run_route(inputs)[2]
    norm = np.sqrt(np.maximum(np.abs(weight).sum(-1, dtype=np.int64), 1))
    assert (np.abs(score - score_reference(inputs, weight)) <= error_bound(x, weight, SCORES) / norm).all()

    inputs, _ = tile_matmul_inputs(rng, num_tokens, 1, num_rows, width)
    inputs |= {"x": x, "packed": to_panels(weight[None])}
    y = native_session(make_model(TERNARY_TILE_MATMUL, group_size=group_size)).run(None, inputs)[0]
    bound = error_bound(x, weight, PRODUCTS, group_size) * inputs["row_scale"]
    assert (np.abs(y - tile_matmul_reference(inputs, weight[None])) <= bound).all()


@pytest.mark.parametrize("width", [64, 512, 1024])
@pytest.mark.parametrize(
    ("kind", "levels", "share"),
    [("gaussian", SCORES, 0.02), ("uniform", SCORES, 0.02), ("gaussian", PRODUCTS, 0.0), ("squared relu", PRODUCTS, 0.001)],
)
def test_ordinary_tokens_are_multiplied_once(width: int, kind: str, levels: Levels, share: float) -> None:
    """They have the bits of the product of 24 bits alone, as those had before there was a second."""
    rng = np.random.default_rng(width)
    x = rng.standard_normal((1000, width), dtype=np.float32)
    if kind == "uniform":
        x = rng.uniform(-1, 1, x.shape).astype(np.float32)
    elif kind == "squared relu":
        x = np.maximum(x, 0) ** 2
    wide = is_wide(x, levels)
    assert wide.mean() <= share
    inputs, signatures = route_inputs(rng, len(x), 40, width)
    if levels == SCORES:
        scale = np.float32(1) / np.sqrt(np.maximum(np.abs(signatures).sum(-1, dtype=np.int64), 1).astype(np.float32))
        got = run_route(inputs | {"x": x})[2]
    else:
        tiles = {"packed": to_panels(signatures[None]), "row_scale": np.full((1, 40), 0.3, np.float32)}
        scale = tiles["row_scale"][0]
        feeds = {"x": x, "tile_idx": np.zeros(len(x), np.int64)} | tiles
        got = native_session(make_model(TERNARY_TILE_MATMUL)).run(None, feeds)[0]
    np.testing.assert_array_equal(got[~wide], plain_product(x, signatures, scale)[~wide])


def test_a_wide_token_changes_no_other() -> None:
    rng = np.random.default_rng(1)
    inputs, _ = route_inputs(rng, 60, 30, 200)
    before = run_route(inputs)[2]
    inputs["x"][::7, 3] = 1e7
    for num_threads in (1, 3):
        after = run_route(inputs, num_threads=num_threads)[2]
        is_other = np.arange(60) % 7 != 0
        np.testing.assert_array_equal(after[is_other], before[is_other])
        alone = run_route(inputs | {"x": inputs["x"][:1]})[2]
        np.testing.assert_array_equal(after[:1], alone)


@pytest.mark.parametrize("group_size", [0, 128])
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_feed_forward_layer_is_as_exact_as_the_function(top_k: int, group_size: int) -> None:
    """Huge activations of some tokens meet weights of 0 alone, in the second product by way of hidden values that are huge."""
    rng = np.random.default_rng(2)
    inputs, _ = ffn_inputs(rng, 30, top_k, 3, 300, 200)
    up, down = random_ternary(rng, 3, 200, 300), random_ternary(rng, 3, 300, 200)
    up[:, :, 7], up[:, 9, 11] = 0, 1
    up[:, :9, 11], up[:, 10:, 11], down[:, :, 9] = 0, 0, 0
    inputs |= {"up": to_panels(up), "down": to_panels(down)}
    inputs["x"][::2, 7], inputs["x"][::3, 11] = 1e6, 1e5
    chosen = inputs["tile_idx"]
    before = np.einsum("td,tkhd->tkh", inputs["x"].astype(np.float64), up[chosen]) * inputs["up_scale"][chosen]
    part = np.einsum("tkh,tkdh->tkd", np.maximum(before, 0) ** 2, down[chosen]) * inputs["down_scale"][chosen]
    exact = (part * inputs["weight"][..., None]).sum(axis=1)
    model = make_model(TERNARY_FFN, with_functions=True, group_size=group_size)
    errors = [
        np.abs(session(model).run(None, inputs)[0] - exact).max(-1) / (np.abs(exact).max(-1) + 1e-30)
        for session in (native_session, portable_session)
    ]
    assert (errors[0] <= 4 * errors[1].max()).all(), errors


def test_a_sparse_lookup_routes_wide_tokens_exactly() -> None:
    rng = np.random.default_rng(3)
    inputs, _, _ = lookup_inputs(rng, 50, 2, 20, 150, 8, route_on_norm=0)
    signatures = random_ternary(rng, 20, 150)
    signatures[:, 5], signatures[:, 140] = 0, 0
    inputs["signatures"], inputs["bias"][:] = to_panels(signatures), 0
    inputs["routing_x"][::2, 5], inputs["routing_x"][::3, 140] = 3e6, -1e9
    key = score_reference({"x": inputs["routing_x"]}, signatures)
    tile_idx = native_session(make_model(SPARSE_LOOKUP, top_k=2, route_on_norm=0)).run(["tile_idx"], inputs)[0]
    best = np.take_along_axis(key, rank_tiles(key, 3), axis=1)
    is_clear = (best[:, :-1] - best[:, 1:] > 1e-4).all(1)
    assert is_clear.mean() > 0.9
    np.testing.assert_array_equal(tile_idx[is_clear], rank_tiles(key, 2)[is_clear])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_wide_token_that_is_not_finite_is_nan(bad: float) -> None:
    inputs, _ = tile_matmul_inputs(np.random.default_rng(4), 3, 1, 5, 300)
    inputs["x"][:, 0], inputs["x"][1, 200] = 1e8, bad
    y = native_session(make_model(TERNARY_TILE_MATMUL)).run(None, inputs)[0]
    np.testing.assert_array_equal(np.isnan(y), np.repeat([[False], [True], [False]], 5, axis=1))
