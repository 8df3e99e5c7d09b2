"""Feed a sanitized build of the library byte-mutated models and inputs of random shapes.

Usage: fuzz_worker.py LIBRARY SEED NUM_MODELS NUM_RUNS. Every rejection is fine; a sanitizer report or a crash ends the
process. Prints how many models loaded and how many runs gave a result.
"""

import sys

import numpy as np
import onnxruntime as ort
from packed_models import ffn_inputs, lookup_inputs, make_model, route_inputs, tile_matmul_inputs

from ort_ops.schema import OPS, SIGNATURE_ROUTE, SPARSE_LOOKUP, TERNARY_FFN, TERNARY_TILE_MATMUL, OpSchema

Inputs = dict[str, np.ndarray]
UNKNOWN_RANKS = {tensor.name: None for op in OPS for tensor in op.inputs}


def options_for(library: str) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    # Each tensor gets its own heap block, whose borders the sanitizer watches.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def valid_case(rng: np.random.Generator) -> tuple[OpSchema, Inputs, dict[str, int]]:
    bits = {"activation_bits": int(rng.choice([8, 24])), "group_size": int(rng.choice([0, 128]))}
    if rng.random() < 0.3:
        sizes = (rng.integers(0, 9), rng.integers(1, 4), rng.integers(1, 5), rng.integers(0, 70), rng.integers(0, 150))
        return TERNARY_FFN, ffn_inputs(rng, *map(int, sizes))[0], bits
    if rng.random() < 0.3:
        kind = {"grid_size": int(rng.integers(1, 40)), "has_hinges": int(rng.integers(0, 2))}
        sizes = (rng.integers(0, 40), rng.integers(0, 4), rng.integers(1, 5), rng.integers(0, 70), rng.integers(0, 70))
        return SPARSE_LOOKUP, lookup_inputs(rng, *map(int, sizes), **kind)[0], kind
    if rng.random() < 0.5:
        sizes = (rng.integers(0, 9), rng.integers(1, 5), rng.integers(0, 70), rng.integers(0, 300))
        return TERNARY_TILE_MATMUL, tile_matmul_inputs(rng, *map(int, sizes))[0], bits
    num_tiles = int(rng.integers(1, 70))
    inputs, _ = route_inputs(rng, int(rng.integers(0, 9)), num_tiles, int(rng.integers(0, 70)))
    return SIGNATURE_ROUTE, inputs, {"top_k": int(rng.integers(1, num_tiles + 1))}


def spoil(rng: np.random.Generator, inputs: Inputs) -> Inputs:
    """Replace some inputs by others of random rank, size and content."""
    spoiled = dict(inputs)
    for name, array in inputs.items():
        if rng.random() < 0.4:
            shape = list(rng.integers(0, 9, size=rng.integers(0, 5) if rng.random() < 0.3 else array.ndim))
            if array.dtype == np.uint8 and shape and rng.random() < 0.8:
                shape[-1] = 128
            if array.dtype == np.float32:
                spoiled[name] = rng.standard_normal(shape).astype(np.float32)
            else:
                low = -2 if array.dtype == np.int64 else 0
                spoiled[name] = rng.integers(low, 5, size=shape).astype(array.dtype)
        elif rng.random() < 0.2 and array.size > 0:
            raw = bytearray(array.tobytes())
            raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
            spoiled[name] = np.frombuffer(bytes(raw), array.dtype).reshape(array.shape)
    return spoiled


def mutate(rng: np.random.Generator, model: bytes) -> bytes:
    raw = bytearray(model)
    for _ in range(int(rng.integers(1, 5))):
        raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
    return bytes(raw)


def session_or_none(model: bytes, library: str) -> ort.InferenceSession | None:
    try:
        return ort.InferenceSession(model, options_for(library), providers=["CPUExecutionProvider"])
    except Exception:  # any rejection, and UnicodeDecodeError for messages that hold mutated bytes
        return None


def has_result(session: ort.InferenceSession, inputs: Inputs) -> bool:
    try:
        session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    except Exception:
        return False
    return True


def main(library: str, seed: int, num_models: int, num_runs: int) -> None:
    rng = np.random.default_rng(seed)
    num_loaded = num_results = 0
    for _ in range(num_models):
        op, inputs, attributes = valid_case(rng)
        weights = {name: array for name, array in inputs.items() if name not in ("x", "h", "tile_idx", "score", "weight")}
        constants = weights if rng.random() < 0.5 else {}
        model = make_model(op, constants=constants, **attributes).SerializeToString()
        session = session_or_none(mutate(rng, model), library)
        if session is not None:
            num_loaded += 1
            num_results += has_result(session, inputs)
    for _ in range(num_runs):
        op, inputs, attributes = valid_case(rng)
        model = make_model(op, dims=UNKNOWN_RANKS, **attributes).SerializeToString()
        session = session_or_none(model, library)
        assert session is not None
        num_results += has_result(session, inputs)
        num_results += has_result(session, spoil(rng, inputs))
    print(f"loaded {num_loaded} of {num_models} mutated models, {num_results} runs gave a result")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
