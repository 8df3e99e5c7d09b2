"""Small models around one operator, and float64 references, for the tests of the native operators."""

import math
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from ort_ops.library import session_options
from ort_ops.operators import fallback_functions
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL
from ort_ops.panels import from_panels, to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION, OpSchema

ELEMENT_TYPES = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8, "int64": TensorProto.INT64}
Arrays = Mapping[str, np.ndarray]
Axes = Collection[int] | None


def random_ternary(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(-1, 2, size=shape, dtype=np.int8)


def tile_matmul_inputs(
    rng: np.random.Generator, num_tokens: int, num_tiles: int, num_rows: int, num_columns: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random valid inputs of TernaryTileMatMul and the unpacked weights."""
    weight = random_ternary(rng, num_tiles, num_rows, num_columns)
    inputs = {
        "x": rng.standard_normal((num_tokens, num_columns), dtype=np.float32),
        "packed": to_panels(weight),
        "row_scale": rng.uniform(0.1, 2.0, (num_tiles, num_rows)).astype(np.float32),
        "tile_idx": rng.integers(0, num_tiles, num_tokens),
    }
    return inputs, weight


def matmul_inputs(
    rng: np.random.Generator, num_texts: int, num_tokens: int, num_rows: int, num_columns: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random valid inputs of TernaryMatMul and the unpacked weights."""
    weight = random_ternary(rng, num_rows, num_columns)
    inputs = {
        "x": rng.standard_normal((num_texts, num_tokens, num_columns), dtype=np.float32),
        "packed": to_panels(weight),
        "row_scale": rng.uniform(0.1, 2.0, num_rows).astype(np.float32),
    }
    return inputs, weight


def random_activations(rng: np.random.Generator) -> dict[str, int | float]:
    """Valid attributes of the operators that quantise activations."""
    bits = int(rng.choice([8, 24]))
    floor = float(rng.choice([0.0, 1e-5, 1.0])) if bits == 8 else 0.0
    return {"activation_bits": bits, "group_size": int(rng.choice([0, 128])), "min_magnitude": floor}


def ffn_inputs(
    rng: np.random.Generator, num_tokens: int, top_k: int, num_tiles: int, width: int, num_hidden: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random valid inputs of TernaryFFN, a fifth of the weights 0, and y in float64."""
    up, down = random_ternary(rng, num_tiles, num_hidden, width), random_ternary(rng, num_tiles, width, num_hidden)
    weight = rng.uniform(0.5, 1.5, (num_tokens, top_k)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.2] = 0.0
    inputs = {
        "x": rng.standard_normal((num_tokens, width), dtype=np.float32),
        "tile_idx": rng.integers(0, num_tiles, (num_tokens, top_k)),
        "weight": weight,
        "up": to_panels(up),
        "up_scale": rng.uniform(0.1, 2.0, (num_tiles, num_hidden)).astype(np.float32),
        "down": to_panels(down),
        "down_scale": rng.uniform(0.1, 2.0, (num_tiles, width)).astype(np.float32),
    }
    chosen, x = inputs["tile_idx"], inputs["x"].astype(np.float64)
    hidden = np.maximum(np.einsum("td,tkhd->tkh", x, up[chosen]) * inputs["up_scale"][chosen], 0.0) ** 2
    part = np.einsum("tkh,tkdh->tkd", hidden, down[chosen]) * inputs["down_scale"][chosen]
    return inputs, (part * weight[..., None]).sum(axis=1)


def lookup_inputs(
    rng: np.random.Generator,
    num_tokens: int,
    top_k: int,
    num_tiles: int,
    width: int,
    num_hidden: int,
    grid_size: int = 16,
    has_hinges: int = 0,
    route_on_norm: int = 1,
    epsilon: float = 1e-5,
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Random valid inputs of SparseLookup, and y and tile_idx in float64. Tiles that are not needed are free now and then."""

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    spline_size = 4 * grid_size + 1 if has_hinges else (grid_size + 1) ** 2
    bias = normal(num_tiles)
    bias[rng.permutation(num_tiles)[: int(rng.integers(0, num_tiles - top_k + 1))]] = -np.inf
    inputs = {
        "x": normal(num_tokens, width) * np.float32(2) + np.float32(0.3),
        "routing_x": normal(num_tokens, width) * np.float32(3),
        "norm_weight": normal(width) + np.float32(1),
        "norm_bias": normal(width),
        "signatures": to_panels(random_ternary(rng, num_tiles, width)),
        "bias": bias,
        "gate_curve": rng.uniform(0.2, 2.0, int(rng.integers(2, 9))).astype(np.float32),
        "compress": normal(width, num_hidden) / np.float32(max(width, 1) ** 0.5),
        "compress_bias": normal(num_hidden),
        "point_weight": normal(2, num_hidden) / np.float32(max(num_hidden, 1) ** 0.5),
        "point_bias": normal(2) * np.float32(0.3),
        "splines": normal(num_tiles, spline_size) / np.float32(max(grid_size / 8, 1)),
        "direction": normal(num_tiles, width),
    }
    arrays = {name: np.asarray(array) for name, array in inputs.items()}
    return arrays, *lookup_reference(arrays, top_k, grid_size, has_hinges, route_on_norm, epsilon)


def lookup_keys(inputs: Arrays, route_on_norm: int = 1, epsilon: float = 1e-5) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """h [T, D], score and score + bias [T, E] in float64."""
    x = inputs["x"].astype(np.float64)
    centred = x - x.mean(axis=1, keepdims=True) if x.size else x
    variance = (centred**2).mean(axis=1, keepdims=True) if x.size else np.ones((len(x), 1))
    h = centred / np.sqrt(variance + epsilon) * inputs["norm_weight"] + inputs["norm_bias"]
    signatures = from_panels(inputs["signatures"], len(inputs["bias"]), x.shape[1])
    score = score_reference({"x": h if route_on_norm else inputs["routing_x"]}, signatures)
    return h, score, score + inputs["bias"]


def lookup_reference(
    inputs: Arrays, top_k: int, grid_size: int, has_hinges: int, route_on_norm: int = 1, epsilon: float = 1e-5
) -> tuple[np.ndarray, np.ndarray]:
    """y [T, D] in float64, token by token, and tile_idx [T, K]."""
    exact = {name: array.astype(np.float64) for name, array in inputs.items() if array.dtype == np.float32}
    h, score, key = lookup_keys(inputs, route_on_norm, epsilon)
    tile_idx = rank_tiles(key, top_k)
    before = h @ exact["compress"] + exact["compress_bias"]
    hidden = before * 0.5 * (1.0 + np.vectorize(math.erf, otypes=[np.float64])(before / 2**0.5))
    point = np.tanh(hidden @ exact["point_weight"].T + exact["point_bias"])
    knots = np.linspace(0.0, 1.0, len(exact["gate_curve"]))
    y = exact["x"].copy()
    for t, tiles in enumerate(tile_idx):
        for tile in tiles:
            gate = np.interp(1.0 / (1.0 + np.exp(-score[t, tile])), knots, exact["gate_curve"])
            magnitude = _hinge_magnitude if has_hinges else _grid_magnitude
            y[t] += gate * magnitude(exact["splines"][tile], point[t], grid_size) * exact["direction"][tile]
    return y, tile_idx


def _hinge_magnitude(row: np.ndarray, point: np.ndarray, grid_size: int) -> float:
    slope, other_slope, offset, height = row[:-1].reshape(4, grid_size)
    return float((np.maximum(slope * point[0] + other_slope * point[1] + offset, 0.0) * height).sum() + row[-1])


def _grid_magnitude(row: np.ndarray, point: np.ndarray, grid_size: int) -> float:
    """Along the second axis of every row of corners first, then along the first."""
    places = np.linspace(-1.0, 1.0, grid_size + 1)
    along = [np.interp(point[1], places, corners) for corners in row.reshape(grid_size + 1, grid_size + 1)]
    return float(np.interp(point[0], places, along))


def route_inputs(
    rng: np.random.Generator, num_tokens: int, num_tiles: int, num_columns: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Random valid inputs of SignatureRoute and the unpacked signatures."""
    signatures = random_ternary(rng, num_tiles, num_columns)
    inputs = {
        "x": rng.standard_normal((num_tokens, num_columns), dtype=np.float32),
        "signatures": to_panels(signatures),
        "bias": rng.standard_normal(num_tiles, dtype=np.float32) * np.float32(0.1),
        "log_mass": rng.standard_normal(num_tiles, dtype=np.float32) * np.float32(0.5),
    }
    return inputs, signatures


def grouped_route_inputs(
    rng: np.random.Generator, num_tokens: int, num_groups: int, num_tiles: int, num_columns: int
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Random valid inputs of SignatureRoute for several groups of tiles, and those for each group alone."""
    groups = [route_inputs(rng, num_tokens, num_tiles, num_columns)[0] for _ in range(num_groups)]
    joined = {name: np.concatenate([group[name] for group in groups]) for name in ("signatures", "bias", "log_mass")}
    return {"x": groups[0]["x"]} | joined, [group | {"x": groups[0]["x"]} for group in groups]


def sweep_inputs(rng: np.random.Generator, B: int, H: int, T: int) -> dict[str, np.ndarray]:
    """Random valid inputs of ResolventSweep; now and then a token begins a new text."""
    w = rng.uniform(0.0, 2.0, (B, H, T)) * (rng.random((B, H, T)) > 0.1)
    values = {
        "alpha_re": rng.standard_normal((B, H, T)),
        "alpha_im": -rng.uniform(0.05, 1.0, (B, H, T)),
        "w": w,
        "first_re": rng.standard_normal((B, H)),
        "first_im": rng.random((B, H)),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def sweep_reference(inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """G_re and G_im in float64."""
    alpha, G = (_complex(inputs, name) for name in ("alpha", "first"))
    result = np.zeros(alpha.shape, np.complex128)
    for t in range(alpha.shape[-1]):
        result[..., t] = G = 1.0 / (alpha[..., t] - inputs["w"][..., t].astype(np.float64) * G)
    return result.real, result.imag


def mix_inputs(
    rng: np.random.Generator, B: int, H: int, T: int, N: int, P: int, q_axes: Axes = None, k_axes: Axes = None
) -> dict[str, np.ndarray]:
    """Random valid inputs of ResolventMix. The decay |c G| is below 1 for most tokens. q_axes, k_axes: the shared ones."""
    shapes = {"G_re": (B, H, T), "c_re": (B, H, T), "u": (B, H, T, P), "first_re": (B, H, N, P)}
    shapes |= {name.replace("re", "im"): shape for name, shape in shapes.items() if name != "u"}
    shapes |= {
        name: (*(1 if axis in (shared or ()) else size for axis, size in enumerate((B, H, T))), N)
        for name, shared in (("q", q_axes), ("k", k_axes))
    }
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return inputs | {name: inputs[name] * np.float32(0.4) for name in ("G_re", "G_im")}


def mix_reference(inputs: Arrays) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """y_re, y_im, last_re and last_im in float64."""
    G, c, state = (_complex(inputs, name) for name in ("G", "c", "first"))
    u = inputs["u"].astype(np.float64)
    q, k = (np.broadcast_to(inputs[name].astype(np.float64), (*G.shape, inputs[name].shape[-1])) for name in ("q", "k"))
    y = np.zeros(u.shape, np.complex128)
    for t in range(u.shape[2]):
        drive = k[:, :, t, :, None] * u[:, :, t, None, :]
        state = G[:, :, t, None, None] * (drive - c[:, :, t, None, None] * state)
        y[:, :, t] = (q[:, :, t, :, None] * state).sum(axis=2)
    return y.real, y.imag, state.real, state.imag


def _complex(inputs: Arrays, name: str) -> np.ndarray:
    return inputs[f"{name}_re"].astype(np.float64) + 1j * inputs[f"{name}_im"].astype(np.float64)


def tile_matmul_reference(inputs: Arrays, weight: np.ndarray) -> np.ndarray:
    """y in float64."""
    tile_idx = inputs["tile_idx"]
    product = np.einsum("tk,tnk->tn", inputs["x"].astype(np.float64), weight[tile_idx].astype(np.float64))
    return product * inputs["row_scale"][tile_idx]


def quantised(x_TK: np.ndarray, group_size: int, min_magnitude: float = 0.0) -> np.ndarray:
    """x as the int8 kernels see it: q * scale, in groups of group_size columns (0: one group)."""
    num_tokens, num_columns = x_TK.shape
    size = group_size or max(num_columns, 1)
    num_groups = -(-num_columns // size)
    group_TGC = np.pad(x_TK, ((0, 0), (0, num_groups * size - num_columns))).reshape(num_tokens, num_groups, size)
    largest = np.abs(group_TGC).max(-1, keepdims=True, initial=min_magnitude)
    one = np.float32(1 if min_magnitude else 127)  # with a least magnitude 127 / m is 127 * (1 / m), rounded twice
    factor = np.divide(one, largest, out=np.zeros_like(largest), where=largest > 0) * (np.float32(127) / one)
    q_TGC = np.rint(group_TGC * factor)
    return (q_TGC * (largest / np.float32(127))).reshape(num_tokens, num_groups * size)[:, :num_columns]


def score_reference(inputs: Arrays, signatures: np.ndarray) -> np.ndarray:
    """Scores in float64."""
    nnz = np.maximum(np.abs(signatures).sum(-1, dtype=np.int64), 1)
    return inputs["x"].astype(np.float64) @ signatures.T.astype(np.float64) / np.sqrt(nnz)


def weight_reference(
    score_TE: np.ndarray, tile_idx_TK: np.ndarray, inputs: Arrays, gate: int = 1, confidence_threshold: float = 0.3
) -> np.ndarray:
    """Weights in float64, for scores that are numbers."""
    is_free_E = np.isneginf(inputs["bias"])
    used_TE = np.where(is_free_E, -np.inf, score_TE.astype(np.float64))
    chosen_TK = np.take_along_axis(used_TE, tile_idx_TK, axis=1)
    if gate == 0:
        return 1.0 / (1.0 + np.exp(-chosen_TK))
    with np.errstate(invalid="ignore"):
        if gate == 1:
            return np.exp(chosen_TK) / np.exp(used_TE + inputs["log_mass"]).sum(1, keepdims=True) * len(is_free_E) ** 0.5
        # The subtraction of float32, so that a threshold met exactly is met here, too.
        gap_TE = score_TE[:, ~is_free_E].max(1, keepdims=True, initial=-np.inf) - score_TE[:, ~is_free_E]
        num_used_T1 = (gap_TE <= np.float32(confidence_threshold)).sum(1, keepdims=True).clip(1, tile_idx_TK.shape[1])
        power_TK = np.where(np.arange(tile_idx_TK.shape[1]) < num_used_T1, np.exp(chosen_TK), 0.0)
        return power_TK / power_TK.sum(1, keepdims=True)


def rank_tiles(key_TE: np.ndarray, top_k: int) -> np.ndarray:
    """Best first, ties to the lowest index, NaN last."""
    is_nan = np.isnan(key_TE)
    order = np.lexsort((np.where(is_nan, 0, -key_TE), is_nan), axis=-1)
    return order[:, :top_k]


def make_model(
    op: OpSchema,
    *,
    constants: Arrays | None = None,
    dims: Mapping[str, list[Any] | None] | None = None,
    with_functions: bool = False,
    output_shapes: bool = True,
    left_out: Collection[str] = (),
    **attributes: object,
) -> onnx.ModelProto:
    """One node of `op`. Inputs named in `constants` become initializers; `dims` overrides an input's dimensions (None: unknown
    rank). `output_shapes=False` declares no shapes of outputs, so that inference must find them. `left_out` names outputs that
    the node has under no name."""
    op_outputs = [tensor for tensor in op.outputs if tensor.name not in left_out]
    constants = constants or {}
    dims = dims or {}
    inputs = [
        helper.make_tensor_value_info(
            tensor.name, ELEMENT_TYPES[tensor.element_type], dims.get(tensor.name, list(tensor.shape))
        )
        for tensor in op.inputs
        if tensor.name not in constants
    ]
    outputs = [
        helper.make_tensor_value_info(
            tensor.name,
            ELEMENT_TYPES[tensor.element_type],
            [f"{tensor.name}_{axis}" for axis in range(len(tensor.shape))] if output_shapes else None,
        )
        for tensor in op_outputs
    ]
    node = helper.make_node(
        op.name,
        [tensor.name for tensor in op.inputs],
        ["" if tensor.name in left_out else tensor.name for tensor in op.outputs],
        domain=DOMAIN,
        name=f"the_{op.name}",
        **attributes,
    )
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "one_op", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    if with_functions:
        model.functions.extend(fallback_functions())
    return model


def native_session(model: onnx.ModelProto, *, num_threads: int = 1) -> ort.InferenceSession:
    options = session_options(intra_op_num_threads=num_threads)
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def portable_session(model: onnx.ModelProto) -> ort.InferenceSession:
    """A session without the native library."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def float_constant_bytes(model: onnx.ModelProto) -> int:
    """Bytes of float initializers and constants in the graph that onnxruntime runs without the library."""
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimised = onnx.load(options.optimized_model_filepath)

    def tensors(graph: onnx.GraphProto) -> list[TensorProto]:
        found = list(graph.initializer)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    found.append(attribute.t)
                if attribute.HasField("g"):
                    found += tensors(attribute.g)
        return found

    is_float = [tensor for tensor in tensors(optimised.graph) if tensor.data_type == TensorProto.FLOAT]
    return sum(4 * int(np.prod(tensor.dims)) for tensor in is_float)


def run_tile_matmul(inputs: Arrays, *, num_threads: int = 1) -> np.ndarray:
    return native_session(make_model(TERNARY_TILE_MATMUL), num_threads=num_threads).run(None, dict(inputs))[0]


def run_route(
    inputs: Arrays, top_k: int = 1, *, num_threads: int = 1, **attributes: object
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """tile_idx, weight, score."""
    model = make_model(SIGNATURE_ROUTE, top_k=top_k, **attributes)
    tile_idx, weight, score = native_session(model, num_threads=num_threads).run(None, dict(inputs))
    return tile_idx, weight, score
