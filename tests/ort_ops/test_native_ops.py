"""The native operators in a real session: values, shapes, ties, and the text of every rejection."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from packed_models import (
    make_model,
    native_session,
    random_ternary,
    rank_tiles,
    route_inputs,
    run_route,
    run_tile_matmul,
    score_reference,
    tile_matmul_inputs,
    tile_matmul_reference,
)

from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import from_panels, to_panels

pytestmark = pytest.mark.usefixtures("native_library")

UNKNOWN_RANKS = {tensor.name: None for op in (TERNARY_TILE_MATMUL, SIGNATURE_ROUTE) for tensor in op.inputs}


def rounding_bound(x: np.ndarray, terms: int) -> float:
    """Rounding of a sum of `terms` standard normal products, generous by a factor of a few."""
    return 4 * np.finfo(np.float32).eps * max(terms, 1) ** 0.5 * max(float(np.abs(x).max(initial=0)), 1.0)


# --- TernaryTileMatMul: values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_tiles", "num_rows", "num_columns"),
    [(1, 1, 1, 1), (1, 1, 5, 7), (2, 3, 4, 16), (7, 2, 9, 17), (13, 5, 30, 63), (40, 16, 33, 130), (9, 1, 64, 1027)],
)
def test_tile_matmul_equals_float64_reference(num_tokens: int, num_tiles: int, num_rows: int, num_columns: int) -> None:
    inputs, weight = tile_matmul_inputs(np.random.default_rng(num_columns), num_tokens, num_tiles, num_rows, num_columns)
    y = run_tile_matmul(inputs)
    assert y.dtype == np.float32
    np.testing.assert_allclose(
        y, tile_matmul_reference(inputs, weight), rtol=0, atol=2 * rounding_bound(inputs["x"], num_columns)
    )


def test_permuting_tokens_permutes_outputs_exactly() -> None:
    rng = np.random.default_rng(2)
    inputs, _ = tile_matmul_inputs(rng, 50, 4, 20, 45)
    order = rng.permutation(50)
    permuted = inputs | {"x": inputs["x"][order], "tile_idx": inputs["tile_idx"][order]}
    np.testing.assert_array_equal(run_tile_matmul(permuted), run_tile_matmul(inputs)[order])


def test_tiles_without_tokens_are_allowed() -> None:
    inputs, weight = tile_matmul_inputs(np.random.default_rng(3), 6, 8, 5, 12)
    inputs["tile_idx"] = np.array([7, 7, 2, 7, 2, 7])
    np.testing.assert_allclose(run_tile_matmul(inputs), tile_matmul_reference(inputs, weight), atol=1e-5)


@pytest.mark.parametrize(
    ("num_tokens", "num_tiles", "num_rows", "num_columns"), [(0, 3, 5, 8), (0, 0, 5, 8), (4, 2, 0, 8), (4, 2, 3, 0)]
)
def test_tile_matmul_of_empty_sizes(num_tokens: int, num_tiles: int, num_rows: int, num_columns: int) -> None:
    rng = np.random.default_rng(4)
    inputs, _ = tile_matmul_inputs(rng, num_tokens, max(num_tiles, 1), num_rows, num_columns)
    inputs["packed"], inputs["row_scale"] = inputs["packed"][:num_tiles], inputs["row_scale"][:num_tiles]
    y = run_tile_matmul(inputs)
    np.testing.assert_array_equal(y, np.zeros((num_tokens, num_rows), np.float32))


def test_tiles_without_rows_cost_no_memory() -> None:
    """Such tiles hold no bytes, so that any number of them fits into a model."""
    num_tiles = 2**50
    session = native_session(make_model(TERNARY_TILE_MATMUL, dims=UNKNOWN_RANKS))
    packed = u8(num_tiles, 0, 1, 128)
    inputs = {"x": f32(3, 8), "packed": packed, "row_scale": f32(num_tiles, 0), "tile_idx": np.zeros(3, np.int64)}
    assert session.run(None, inputs)[0].shape == (3, 0)


@pytest.mark.parametrize("num_threads", [2, 5])
def test_results_do_not_depend_on_threads(num_threads: int) -> None:
    rng = np.random.default_rng(5)
    inputs, _ = tile_matmul_inputs(rng, 300, 3, 200, 333)
    np.testing.assert_array_equal(run_tile_matmul(inputs), run_tile_matmul(inputs, num_threads=num_threads), strict=True)
    inputs, _ = route_inputs(rng, 500, 40, 333)
    for one, many in zip(run_route(inputs, 3), run_route(inputs, 3, num_threads=num_threads), strict=True):
        np.testing.assert_array_equal(one, many, strict=True)


def test_one_session_serves_concurrent_runs() -> None:
    inputs, _ = tile_matmul_inputs(np.random.default_rng(6), 64, 4, 64, 64)
    session = native_session(make_model(TERNARY_TILE_MATMUL), num_threads=2)
    expected = session.run(None, inputs)[0]
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: session.run(None, inputs)[0], range(40)):
            np.testing.assert_array_equal(result, expected)


def test_every_flipped_bit_is_rejected_or_changes_exactly_its_weight() -> None:
    rng = np.random.default_rng(7)
    inputs, _ = tile_matmul_inputs(rng, 2, 1, 2, 10)
    session = native_session(make_model(TERNARY_TILE_MATMUL))
    outcomes = {"reserved": 0, "padding": 0, "value": 0}
    for position in range(inputs["packed"].size):
        for bit in range(8):
            packed = inputs["packed"].copy()
            packed.reshape(-1)[position] ^= 1 << bit
            weight = from_panels(packed, 32, 16)
            changed = inputs | {"packed": packed}
            if (weight == 2).any():
                outcomes["reserved"] += 1
                with pytest.raises(Exception, match="must hold only the codes 00, 01 and 10, it holds 11"):
                    session.run(None, changed)
            elif weight[:, 2:].any() or weight[:, :, 10:].any():
                outcomes["padding"] += 1
                with pytest.raises(Exception, match=r"packed must hold 0 \(code 01\) past the last of (2 rows|10 columns)"):
                    session.run(None, changed)
            else:
                outcomes["value"] += 1
                y = session.run(None, changed)[0]
                np.testing.assert_allclose(y, tile_matmul_reference(changed, weight[:, :2, :10]), atol=1e-5)
    assert min(outcomes.values()) > 0, outcomes


# --- SignatureRoute: values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_tokens", "num_tiles", "num_columns", "top_k"),
    [(1, 1, 1, 1), (5, 4, 7, 2), (3, 9, 64, 9), (20, 100, 33, 3), (2, 1000, 20, 1), (70, 16, 129, 1)],
)
def test_route_equals_reference(num_tokens: int, num_tiles: int, num_columns: int, top_k: int) -> None:
    inputs, signatures = route_inputs(np.random.default_rng(top_k), num_tokens, num_tiles, num_columns)
    tile_idx, _, score = run_route(inputs, top_k)
    assert (tile_idx.dtype, score.dtype) == (np.int64, np.float32)
    np.testing.assert_allclose(
        score, score_reference(inputs, signatures), rtol=0, atol=rounding_bound(inputs["x"], num_columns)
    )
    np.testing.assert_array_equal(tile_idx, rank_tiles(score + inputs["bias"], top_k))


def test_score_is_without_the_bias() -> None:
    inputs, _ = route_inputs(np.random.default_rng(8), 4, 6, 10)
    *_, score = run_route(inputs)
    *_, score_unbiased = run_route(inputs | {"bias": np.zeros(6, np.float32)})
    np.testing.assert_array_equal(score, score_unbiased)


def test_ties_go_to_the_lowest_index() -> None:
    signatures = np.tile(random_ternary(np.random.default_rng(9), 1, 12), (20, 1))
    inputs = {
        "x": np.random.default_rng(10).standard_normal((3, 12), dtype=np.float32),
        "signatures": to_panels(signatures),
        "bias": np.zeros(20, np.float32),
        "log_mass": np.zeros(20, np.float32),
    }
    np.testing.assert_array_equal(run_route(inputs, 5)[0], np.tile(np.arange(5), (3, 1)))
    inputs["bias"][[11, 17]] = 1.0
    np.testing.assert_array_equal(run_route(inputs, 4)[0], np.tile([11, 17, 0, 1], (3, 1)))


def test_empty_signatures_score_zero() -> None:
    inputs, signatures = route_inputs(np.random.default_rng(11), 3, 2, 8)
    signatures[1] = 0
    inputs["signatures"] = to_panels(signatures)
    *_, score = run_route(inputs)
    np.testing.assert_array_equal(score[:, 1], np.zeros(3, np.float32))


def test_nan_keys_are_chosen_last() -> None:
    bias = np.array([np.nan, -np.inf, 1, np.nan, 2, np.inf, 0, 0, 0, np.nan], np.float32)
    inputs = {
        "x": np.zeros((2, 4), np.float32),
        "signatures": to_panels(np.ones((10, 4), np.int8)),
        "bias": bias,
        "log_mass": np.zeros(10, np.float32),
    }
    np.testing.assert_array_equal(run_route(inputs, 10)[0], np.tile([5, 4, 2, 6, 7, 8, 1, 0, 3, 9], (2, 1)))
    all_nan = inputs | {"x": np.full((2, 4), np.nan, np.float32)}
    np.testing.assert_array_equal(run_route(all_nan, 1)[0], np.zeros((2, 1)))


@pytest.mark.parametrize(("num_tokens", "num_columns"), [(0, 8), (3, 0)])
def test_route_of_empty_sizes(num_tokens: int, num_columns: int) -> None:
    inputs, _ = route_inputs(np.random.default_rng(12), num_tokens, 4, num_columns)
    tile_idx, _, score = run_route(inputs, 2)
    assert tile_idx.shape == (num_tokens, 2)
    np.testing.assert_array_equal(score, np.zeros((num_tokens, 4), np.float32))


def test_top_k_defaults_to_one() -> None:
    inputs, _ = route_inputs(np.random.default_rng(13), 4, 6, 10)
    tile_idx = native_session(make_model(SIGNATURE_ROUTE)).run(None, inputs)[0]
    np.testing.assert_array_equal(tile_idx, run_route(inputs, 1)[0])


def test_constant_weights_give_the_same_results() -> None:
    rng = np.random.default_rng(14)
    inputs, _ = tile_matmul_inputs(rng, 5, 3, 7, 13)
    weights = {name: inputs[name] for name in ("packed", "row_scale")}
    session = native_session(make_model(TERNARY_TILE_MATMUL, constants=weights))
    y = session.run(None, {name: inputs[name] for name in ("x", "tile_idx")})[0]
    np.testing.assert_array_equal(y, run_tile_matmul(inputs))

    inputs, _ = route_inputs(rng, 5, 6, 13)
    weights = {name: inputs[name] for name in ("signatures", "bias", "log_mass")}
    session = native_session(make_model(SIGNATURE_ROUTE, constants=weights, top_k=2))
    for got, expected in zip(session.run(None, {"x": inputs["x"]}), run_route(inputs, 2), strict=True):
        np.testing.assert_array_equal(got, expected)


# --- Shape inference --------------------------------------------------------------------------------------------------


def inferred_shapes(op: Any, dims: dict[str, Any], **attributes: object) -> list[Any]:
    session = native_session(make_model(op, dims=dims, output_shapes=False, **attributes))
    return [output.shape for output in session.get_outputs()]


def test_shapes_are_inferred_from_numbers_and_names() -> None:
    assert inferred_shapes(TERNARY_TILE_MATMUL, {"x": [5, 8], "row_scale": [2, 3]}) == [[5, 3]]
    assert inferred_shapes(TERNARY_TILE_MATMUL, {"x": ["tokens", 8], "row_scale": ["E", "rows"]}) == [["tokens", "rows"]]
    # The scores', an output that may be left out, stays unknown.
    assert inferred_shapes(SIGNATURE_ROUTE, {"x": ["tokens", 8], "bias": [6]}, top_k=2)[:2] == [["tokens", 2]] * 2
    assert inferred_shapes(SIGNATURE_ROUTE, {"x": [4, 8], "bias": ["E"]})[:2] == [[4, 1]] * 2


@pytest.mark.parametrize("unknown", [None, [None, 8], [7]])
def test_unknown_shapes_stay_unknown(unknown: Any) -> None:
    """Unknown rank, an unnamed dynamic dimension, a wrong rank: no output shape, and no literal -1."""
    for shape in inferred_shapes(TERNARY_TILE_MATMUL, {"x": unknown, "row_scale": [2, 3]}):
        assert not any(isinstance(dim, int) for dim in shape or [])
    for shape in inferred_shapes(SIGNATURE_ROUTE, {"x": unknown, "bias": [6]}, top_k=2):
        assert not any(isinstance(dim, int) for dim in shape or [])


# --- Rejections -------------------------------------------------------------------------------------------------------


def f32(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def u8(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.uint8)


PANEL_SHAPE = "must end in [ceil(rows / 32), ceil(columns / 16), 128] = [1, 1, 128] for 4 rows and the 10 columns of x"
TILE_MATMUL_REJECTIONS = {
    "rank of x": ({"x": f32(5)}, "rank of x (1, shape [5]) must be 2 [T, K]"),
    "rank 0 of x": ({"x": f32()}, "rank of x (0, shape []) must be 2 [T, K]"),
    "rank of packed": (
        {"packed": u8(2, 3)},
        "rank of packed (2, shape [2, 3]) must be 4 [E, ceil(N/32), ceil(K/16), 128]",
    ),
    "rank of row_scale": ({"row_scale": f32(2, 4, 1)}, "rank of row_scale (3, shape [2, 4, 1]) must be 2 [E, N]"),
    "rank of tile_idx": (
        {"tile_idx": np.zeros((5, 1), np.int64)},
        "rank of tile_idx (2, shape [5, 1]) must be 1 [T]",
    ),
    "few panels": ({"packed": u8(2, 0, 1, 128)}, f"shape of packed [2, 0, 1, 128] {PANEL_SHAPE}"),
    "many blocks": ({"packed": u8(2, 1, 2, 128)}, f"shape of packed [2, 1, 2, 128] {PANEL_SHAPE}"),
    "short blocks": ({"packed": u8(2, 1, 1, 127)}, f"shape of packed [2, 1, 1, 127] {PANEL_SHAPE}"),
    "rows of row_scale": (
        {"row_scale": f32(2, 33)},
        "shape of packed [2, 1, 1, 128] must end in [ceil(rows / 32), ceil(columns / 16), 128] = [2, 1, 128] for 33 rows",
    ),
    "tiles of row_scale": (
        {"row_scale": f32(1, 4)},
        "shape of row_scale [1, 4] must be [E, N] with the E tiles of packed [2, 1, 1, 128]",
    ),
    "length of tile_idx": (
        {"tile_idx": np.zeros(4, np.int64)},
        "length of tile_idx (4) must be the number of tokens of x (5)",
    ),
    "tile too large": (
        {"tile_idx": np.array([0, 1, 2, 0, 0])},
        "tile_idx[2] (2) must be >= 0 and < the number of tiles (2)",
    ),
    "tile negative": (
        {"tile_idx": np.array([0, 1, 1, 0, -1])},
        "tile_idx[4] (-1) must be >= 0 and < the number of tiles (2)",
    ),
    "no tiles": (
        {"packed": u8(0, 1, 1, 128), "row_scale": f32(0, 4)},
        "tile_idx[0] (0) must be >= 0 and < the number of tiles (0)",
    ),
    "reserved code": (
        {"packed": np.full((2, 1, 1, 128), 0x5D, np.uint8)},
        "byte packed[0, 0, 0, 0] (0x5d) must hold only the codes 00, 01 and 10, it holds 11",
    ),
    "padded columns": (
        {"packed": to_panels(np.ones((2, 4, 11), np.int8))},
        "packed must hold 0 (code 01) past the last of 10 columns, columns up to 11 hold another code",
    ),
    "padded rows": (
        {"packed": to_panels(np.ones((2, 7, 10), np.int8))},
        "packed must hold 0 (code 01) past the last of 4 rows, rows up to 7 hold another code",
    ),
}


@pytest.mark.parametrize("case", TILE_MATMUL_REJECTIONS)
def test_tile_matmul_rejects(case: str) -> None:
    changes, text = TILE_MATMUL_REJECTIONS[case]
    packed = to_panels(np.zeros((2, 4, 10), np.int8))
    good = {"x": f32(5, 10), "packed": packed, "row_scale": f32(2, 4), "tile_idx": np.zeros(5, np.int64)}
    session = native_session(make_model(TERNARY_TILE_MATMUL, dims=UNKNOWN_RANKS))
    assert session.run(None, good)[0].shape == (5, 4)
    with pytest.raises(Exception) as failure:  # noqa: PT011  onnxruntime's InvalidArgument is no public name
        session.run(None, good | changes)
    assert f"TernaryTileMatMul: {text}" in str(failure.value)
    assert type(failure.value).__name__ == "InvalidArgument"
    assert session.run(None, good)[0].shape == (5, 4), "a rejected run leaves the session usable"


ROUTE_REJECTIONS = {
    "rank of x": ({"x": f32(5)}, "rank of x (1, shape [5]) must be 2 [T, D]"),
    "rank of signatures": (
        {"signatures": u8(3, 4)},
        "rank of signatures (2, shape [3, 4]) must be 3 [G * ceil(E/32), ceil(D/16), 128]",
    ),
    "rank of bias": ({"bias": f32(4, 1)}, "rank of bias (2, shape [4, 1]) must be 1 [G * E]"),
    "width": ({"signatures": u8(1, 2, 128)}, f"shape of signatures [1, 2, 128] {PANEL_SHAPE}"),
    "length of bias": (
        {"bias": f32(33), "log_mass": f32(33)},
        "shape of signatures [1, 1, 128] must end in [ceil(rows / 32), ceil(columns / 16), 128] = [2, 1, 128] for 33 rows",
    ),
    "rank of log_mass": ({"log_mass": f32(4, 1)}, "rank of log_mass (2, shape [4, 1]) must be 1 [G * E]"),
    "length of log_mass": ({"log_mass": f32(5)}, "length of log_mass (5) must be the number of tiles in bias (4)"),
    "too few tiles": ({"bias": f32(2)}, "top_k (3) must be <= the number of tiles in bias (2)"),
    "reserved code": (
        {"signatures": np.full((1, 1, 128), 0x57, np.uint8)},
        "byte signatures[0, 0, 0] (0x57) must hold only the codes 00, 01 and 10, it holds 11",
    ),
    "padding": (
        {"signatures": to_panels(np.ones((4, 12), np.int8))},
        "signatures must hold 0 (code 01) past the last of 10 columns, columns up to 12 hold another code",
    ),
}


@pytest.mark.parametrize("case", ROUTE_REJECTIONS)
def test_route_rejects(case: str) -> None:
    changes, text = ROUTE_REJECTIONS[case]
    good = {"x": f32(5, 10), "signatures": to_panels(np.zeros((4, 10), np.int8)), "bias": f32(4), "log_mass": f32(4)}
    session = native_session(make_model(SIGNATURE_ROUTE, dims=UNKNOWN_RANKS, top_k=3))
    assert session.run(None, good)[0].shape == (5, 3)
    with pytest.raises(Exception) as failure:  # noqa: PT011
        session.run(None, good | changes)
    assert f"SignatureRoute: {text}" in str(failure.value)
    assert type(failure.value).__name__ == "InvalidArgument"


SESSION_REJECTIONS = {
    "reserved code in tiles": (
        TERNARY_TILE_MATMUL,
        {"constants": {"packed": np.full((1, 1, 1, 128), 0x75, np.uint8)}},
        "byte packed[0, 0, 0, 0] (0x75) must hold only the codes 00, 01 and 10, it holds 11",
    ),
    "rank of constant tiles": (
        TERNARY_TILE_MATMUL,
        {"constants": {"packed": u8(2, 3)}},
        "rank of packed (2, shape [2, 3]) must be 4",
    ),
    "reserved code in signatures": (
        SIGNATURE_ROUTE,
        {"constants": {"signatures": np.full((1, 1, 128), 0xFF, np.uint8)}},
        "byte signatures[0, 0, 0] (0xff) must hold only the codes 00, 01 and 10, it holds 11",
    ),
    "activation_bits": (TERNARY_TILE_MATMUL, {"activation_bits": 16}, "activation_bits (16) must be 24 or 8"),
    "group_size": (TERNARY_TILE_MATMUL, {"activation_bits": 8, "group_size": 64}, "group_size (64) must be 0 or 128"),
    "min_magnitude of 24 bits": (
        TERNARY_TILE_MATMUL,
        {"min_magnitude": 0.5},
        "min_magnitude (0.5) must be 0 with activation_bits 24",
    ),
    "negative min_magnitude": (
        TERNARY_TILE_MATMUL,
        {"activation_bits": 8, "min_magnitude": -1.0},
        "min_magnitude (-1) must be >= 0 and finite",
    ),
    "infinite min_magnitude": (
        TERNARY_TILE_MATMUL,
        {"activation_bits": 8, "min_magnitude": np.inf},
        "min_magnitude (inf) must be >= 0 and finite",
    ),
    "top_k zero": (SIGNATURE_ROUTE, {"top_k": 0}, "top_k (0) must be >= 1"),
    "top_k of another type": (SIGNATURE_ROUTE, {"top_k": 1.5}, "attribute top_k must be an integer"),
    "top_k as text": (SIGNATURE_ROUTE, {"top_k": "two"}, "attribute top_k must be an integer"),
    "top_k as a list": (SIGNATURE_ROUTE, {"top_k": [1, 2]}, "attribute top_k must be an integer"),
}


@pytest.mark.parametrize("case", SESSION_REJECTIONS)
def test_session_creation_rejects(case: str) -> None:
    op, arguments, text = SESSION_REJECTIONS[case]
    model = make_model(op, **arguments)
    with pytest.raises(Exception) as failure:  # noqa: PT011
        native_session(model)
    assert text in str(failure.value)


def test_wrong_element_type_is_refused_when_loading() -> None:
    model = make_model(TERNARY_TILE_MATMUL)
    model.graph.input[0].type.tensor_type.elem_type = 11  # double
    with pytest.raises(Exception, match="Type"):
        native_session(model)
