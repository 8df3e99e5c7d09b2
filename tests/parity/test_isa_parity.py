"""All instruction sets bit for bit, kernel = ONNX function to rounding, and the kernel is what really runs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_fixtures import has_instruction_set
from packed_models import (
    ffn_inputs,
    lookup_inputs,
    make_model,
    matmul_inputs,
    mix_inputs,
    native_session,
    portable_session,
    rank_tiles,
    route_inputs,
    run_route,
    sweep_inputs,
    tile_matmul_inputs,
)

from ort_ops.library import session_options
from ort_ops.operators import SCHEMAS
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.schema import OpSchema

pytestmark = pytest.mark.usefixtures("native_library")


ATTRIBUTES = [{}, {"group_size": 0}, {"activation_bits": 8}, {"activation_bits": 8, "group_size": 0, "min_magnitude": 3.0}]


class IsaWorker:
    """A subprocess that runs cases with TRIX_ORT_ISA set to one value."""

    def __init__(self, isa: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parents[1] / "support" / "isa_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TRIX_ORT_ISA": isa},
        )

    def run(self, case: Path) -> dict[str, np.ndarray]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{case}\n")
        self.process.stdin.flush()
        with np.load(self.process.stdout.readline().strip()) as outputs:
            return {name: outputs[name] for name in outputs.files}

    def close(self) -> None:
        self.process.communicate(timeout=60)


@pytest.fixture(scope="module")
def workers(native_library: None) -> Iterator[list[IsaWorker]]:
    """Of every instruction set that this CPU has, scalar first."""
    names = [name for name in ("scalar", "avx2", "avx512_vnni", "neon", "neon_dotprod") if has_instruction_set(name)]
    if len(names) == 1:
        pytest.skip("this CPU and build have one instruction set: there is nothing to compare")
    started = [IsaWorker(name) for name in names]
    yield started
    for worker in started:
        worker.close()


def assert_all_agree(workers: list[IsaWorker], case: Path) -> None:
    first = workers[0].run(case)
    for worker in workers[1:]:
        assert_same_bits(first, worker.run(case))


def assert_same_bits(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Equal bit patterns; NaN equals NaN, whose payload the contract leaves open."""
    assert one.keys() == other.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(array, other[name], strict=True, err_msg=name)
        if array.dtype == np.float32:
            is_number = ~np.isnan(array)
            assert array[is_number].tobytes() == other[name][is_number].tobytes(), name


def with_outliers(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """Some rows with a few huge values, and some with values of all sizes: wide tokens next to ordinary ones."""
    exponent = rng.uniform(-12, 12, x.shape) * rng.choice([0, 0.3, 1], (len(x), 1))
    exponent = np.where(rng.random((len(x), 1)) < 0.5, np.where(rng.random(x.shape) < 0.05, 6, 0), exponent)
    return (x * 10.0**exponent).astype(np.float32)


def with_specials(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    specials = np.array([np.inf, -np.inf, np.nan, -0.0, 1e-42, 3e38], np.float32)
    return np.where(rng.random(x.shape) < 0.02, rng.choice(specials, x.shape), x).astype(np.float32)


sizes = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)


@sizes
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 40),
    num_tiles=st.integers(1, 6),
    num_rows=st.integers(0, 100),
    num_columns=st.one_of(st.integers(0, 70), st.integers(200, 2100)),
    is_special=st.booleans(),
    has_outliers=st.booleans(),
    attributes=st.sampled_from(ATTRIBUTES),
)
def test_tile_matmul_has_the_same_bits_on_every_instruction_set(
    workers: list[IsaWorker],
    tmp_path: Path,
    seed: int,
    num_tokens: int,
    num_tiles: int,
    num_rows: int,
    num_columns: int,
    is_special: bool,
    has_outliers: bool,
    attributes: dict[str, int],
) -> None:
    rng = np.random.default_rng(seed)
    inputs, _ = tile_matmul_inputs(rng, num_tokens, num_tiles, num_rows, num_columns)
    if has_outliers:
        inputs["x"] = with_outliers(rng, inputs["x"])
    if is_special:
        inputs["x"] = with_specials(rng, inputs["x"])
    case = tmp_path / "case.npz"
    np.savez(case, **inputs, **attributes)
    assert_all_agree(workers, case)


@sizes
@given(
    seed=st.integers(0, 2**32 - 1),
    num_texts=st.integers(0, 3),
    num_tokens=st.integers(0, 20),
    num_rows=st.integers(0, 100),
    num_columns=st.one_of(st.integers(0, 70), st.integers(200, 2100)),
    is_special=st.booleans(),
    attributes=st.sampled_from(ATTRIBUTES),
)
def test_matmul_has_the_same_bits_on_every_instruction_set(
    workers: list[IsaWorker],
    tmp_path: Path,
    seed: int,
    num_texts: int,
    num_tokens: int,
    num_rows: int,
    num_columns: int,
    is_special: bool,
    attributes: dict[str, int],
) -> None:
    rng = np.random.default_rng(seed)
    inputs, _ = matmul_inputs(rng, num_texts, num_tokens, num_rows, num_columns)
    if is_special:
        inputs["x"] = with_specials(rng, inputs["x"])
    case = tmp_path / "case.npz"
    np.savez(case, **inputs, **attributes)
    assert_all_agree(workers, case)


@sizes
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 40),
    num_tiles=st.one_of(st.integers(1, 90), st.integers(256, 300)),
    num_columns=st.integers(0, 150),
    top_k=st.integers(1, 6),
    gate=st.integers(0, 2),
    without_score=st.integers(0, 1),
    is_special=st.booleans(),
    has_outliers=st.booleans(),
)
def test_route_has_the_same_bits_on_every_instruction_set(
    workers: list[IsaWorker],
    tmp_path: Path,
    seed: int,
    num_tokens: int,
    num_tiles: int,
    num_columns: int,
    top_k: int,
    gate: int,
    without_score: int,
    is_special: bool,
    has_outliers: bool,
) -> None:
    rng = np.random.default_rng(seed)
    inputs, _ = route_inputs(rng, num_tokens, num_tiles, num_columns)
    if has_outliers:
        inputs["x"] = with_outliers(rng, inputs["x"])
    if is_special:
        inputs["x"] = with_specials(rng, inputs["x"])
    case = tmp_path / "case.npz"
    inputs["bias"][rng.random(num_tiles) < 0.1] = -np.inf
    attributes = {"top_k": min(top_k, num_tiles), "gate": gate, "without_score": without_score}
    np.savez(case, **inputs, **attributes, confidence_threshold=0.5)
    assert_all_agree(workers, case)


@sizes
@given(
    seed=st.integers(0, 2**32 - 1),
    num_tokens=st.integers(0, 40),
    top_k=st.integers(1, 3),
    num_tiles=st.integers(3, 40),
    width=st.one_of(st.integers(0, 70), st.integers(200, 600)),
    num_hidden=st.integers(0, 150),
    grid_size=st.integers(1, 40),
    has_hinges=st.integers(0, 1),
    route_on_norm=st.integers(0, 1),
    epsilon=st.sampled_from([0.0, 1e-5, 0.5]),
    is_special=st.booleans(),
    has_outliers=st.booleans(),
)
def test_lookup_has_the_same_bits_on_every_instruction_set(
    workers: list[IsaWorker],
    tmp_path: Path,
    seed: int,
    num_tokens: int,
    top_k: int,
    num_tiles: int,
    width: int,
    num_hidden: int,
    grid_size: int,
    has_hinges: int,
    route_on_norm: int,
    epsilon: float,
    is_special: bool,
    has_outliers: bool,
) -> None:
    rng = np.random.default_rng(seed)
    inputs, _, _ = lookup_inputs(rng, num_tokens, top_k, num_tiles, width, num_hidden, grid_size, has_hinges)
    if has_outliers:
        inputs["routing_x"] = with_outliers(rng, inputs["routing_x"])
    if is_special:
        for name in ("x", "routing_x", "norm_weight", "bias", "splines"):
            inputs[name] = with_specials(rng, inputs[name])
    attributes = {"top_k": top_k, "grid_size": grid_size, "has_hinges": has_hinges, "route_on_norm": route_on_norm}
    case = tmp_path / "case.npz"
    np.savez(case, **inputs, **attributes, epsilon=epsilon)
    assert_all_agree(workers, case)


@sizes
@given(
    seed=st.integers(0, 2**32 - 1),
    num_texts=st.integers(0, 3),
    num_heads=st.integers(0, 20),
    num_tokens=st.one_of(st.integers(0, 40), st.integers(300, 400)),
    is_special=st.booleans(),
)
def test_sweep_has_the_same_bits_on_every_instruction_set(
    workers: list[IsaWorker], tmp_path: Path, seed: int, num_texts: int, num_heads: int, num_tokens: int, is_special: bool
) -> None:
    rng = np.random.default_rng(seed)
    inputs = sweep_inputs(rng, num_texts, num_heads, num_tokens)
    if is_special:
        inputs = {name: with_specials(rng, array) for name, array in inputs.items()}
    case = tmp_path / "case.npz"
    np.savez(case, **inputs)
    assert_all_agree(workers, case)


@sizes
@given(
    seed=st.integers(0, 2**32 - 1),
    num_texts=st.integers(0, 3),
    num_heads=st.integers(0, 5),
    num_tokens=st.one_of(st.integers(0, 40), st.integers(300, 400)),
    query_width=st.integers(1, 17),
    num_channels=st.integers(0, 50),
    q_axes=st.sets(st.integers(0, 2)),
    k_axes=st.sets(st.integers(0, 2)),
    is_special=st.booleans(),
)
def test_mix_has_the_same_bits_on_every_instruction_set(
    workers: list[IsaWorker],
    tmp_path: Path,
    seed: int,
    num_texts: int,
    num_heads: int,
    num_tokens: int,
    query_width: int,
    num_channels: int,
    q_axes: set[int],
    k_axes: set[int],
    is_special: bool,
) -> None:
    rng = np.random.default_rng(seed)
    inputs = mix_inputs(rng, num_texts, num_heads, num_tokens, query_width, num_channels, q_axes, k_axes)
    if is_special:
        inputs = {name: with_specials(rng, array) for name, array in inputs.items()}
    case = tmp_path / "case.npz"
    np.savez(case, **inputs)
    assert_all_agree(workers, case)


@pytest.mark.parametrize("attributes", ATTRIBUTES, ids=str)
@pytest.mark.parametrize(("num_tokens", "num_columns"), [(1, 64), (33, 130), (128, 1000)])
def test_function_and_kernel_agree_to_rounding(num_tokens: int, num_columns: int, attributes: dict[str, int]) -> None:
    inputs, _ = tile_matmul_inputs(np.random.default_rng(num_tokens), num_tokens, 7, 50, num_columns)
    model = make_model(TERNARY_TILE_MATMUL, with_functions=True, **attributes)
    expected = portable_session(model).run(None, inputs)[0]
    # Twice the rounding of a sequential float32 sum, as onnxruntime's Gemm has on ARM.
    bound = 2.0**-23 * num_columns**0.5 * np.abs(expected).max()
    np.testing.assert_allclose(native_session(model).run(None, inputs)[0], expected, rtol=0, atol=bound)


@pytest.mark.parametrize("top_k", [1, 3])
def test_function_and_kernel_route_alike_where_the_gap_exceeds_rounding(top_k: int) -> None:
    inputs, _ = route_inputs(np.random.default_rng(top_k), 2000, 64, 200)
    model = make_model(SIGNATURE_ROUTE, with_functions=True, top_k=top_k)
    portable_idx, _, portable_score = portable_session(model).run(None, inputs)
    kernel_idx, _, kernel_score = run_route(inputs, top_k)
    rounding = 1e-5
    np.testing.assert_allclose(kernel_score, portable_score, rtol=0, atol=rounding)
    key = kernel_score + inputs["bias"]
    best = np.take_along_axis(key, rank_tiles(key, top_k + 1), axis=1)
    is_clear = (best[:, :-1] - best[:, 1:] > 2 * rounding).all(axis=1)
    assert is_clear.mean() > 0.99
    np.testing.assert_array_equal(portable_idx[is_clear], kernel_idx[is_clear])


def profiled_node_names(model: bytes, options: ort.SessionOptions, inputs: dict[str, np.ndarray], folder: Path) -> set[str]:
    """The op types that a run executed."""
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    session.run(None, inputs)
    events = json.loads(Path(session.end_profiling()).read_text())
    return {event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})}


@pytest.mark.parametrize("op", SCHEMAS, ids=lambda op: op.name)
@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
def test_registered_kernel_takes_precedence_over_the_function(op: OpSchema, level: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    examples = {
        "TernaryTileMatMul": tile_matmul_inputs(rng, 4, 2, 3, 8),
        "TernaryMatMul": matmul_inputs(rng, 1, 4, 3, 8),
        "SignatureRoute": route_inputs(rng, 4, 2, 8),
        "TernaryFFN": ffn_inputs(rng, 4, 1, 2, 8, 8),
        "SparseLookup": lookup_inputs(rng, 4, 1, 2, 8, 8),
        "ResolventSweep": (sweep_inputs(rng, 1, 2, 4),),
        "ResolventMix": (mix_inputs(rng, 1, 2, 4, 2, 4),),
    }
    inputs = examples[op.name][0]
    model = make_model(op, with_functions=True).SerializeToString()
    native, portable = session_options(), ort.SessionOptions()
    for options in (native, portable):
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    assert profiled_node_names(model, native, inputs, tmp_path) == {op.name}
    portable_ops = profiled_node_names(model, portable, inputs, tmp_path)
    assert op.name not in portable_ops
    assert portable_ops & {"Gemm", "Scan"}


@pytest.mark.parametrize("op", SCHEMAS, ids=lambda op: op.name)
def test_without_functions_the_library_is_needed(op: OpSchema) -> None:
    with pytest.raises(Exception, match="is not a registered function/op"):
        portable_session(make_model(op))
