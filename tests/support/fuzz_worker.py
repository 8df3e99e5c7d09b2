"""Feed a sanitized build of the library byte-mutated models, attributes of any value and inputs of random shapes.

Usage: fuzz_worker.py LIBRARY SEED SECONDS [CASE]. Every rejection is fine; a sanitizer report or a crash ends the process.
Prints the number of each case before it runs (SEED and CASE repeat it alone), and at the end, for each operator and in all, how
many models were mutated, how many were valid, how many inputs may have been wrong, and how many were refused.
"""

import sys
import time
from collections import Counter
from importlib import import_module

import numpy as np
import onnxruntime as ort
from packed_models import make_model

from ort_ops.operators import FILES, OPERATORS
from ort_ops.schema import OpSchema

Inputs = dict[str, np.ndarray]
Attributes = dict[str, int | float]
UNKNOWN_RANKS = {tensor.name: None for operator in OPERATORS.values() for tensor in operator.schema.inputs}
ODD_VALUES = (-(2**63), -(2**31), -1, 0, 1, 7, 16, 64, 128, 2**31, 2**62)


def options_for(library: str) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.register_custom_ops_library(library)
    options.log_severity_level = 4
    options.intra_op_num_threads = 2
    # Each tensor gets its own heap block, whose borders the sanitizer watches.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    return options


def valid_case(rng: np.random.Generator, file: str) -> tuple[Inputs, Attributes]:
    """In half of the cases with some activations that are huge, so that tokens are wide."""
    inputs, attributes = import_module(f"operator_cases.{file}").valid_case(rng)
    if rng.random() < 0.5:
        for name in {"x", "routing_x"} & inputs.keys():
            inputs[name][rng.random(inputs[name].shape) < 0.05] *= np.float32(10.0 ** rng.integers(2, 30))
    return inputs, attributes


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


def spoil_attributes(rng: np.random.Generator, attributes: Attributes) -> Attributes:
    return {name: type(value)(rng.choice(ODD_VALUES)) if rng.random() < 0.5 else value for name, value in attributes.items()}


def mutate(rng: np.random.Generator, model: bytes) -> bytes:
    raw = bytearray(model)
    for _ in range(int(rng.integers(1, 5))):
        raw[int(rng.integers(len(raw)))] = int(rng.integers(256))
    return bytes(raw)


def session_or_none(model: bytes, library: str) -> ort.InferenceSession | None:
    try:
        # Without enable_fallback=0 some rejections are printed and tried again.
        return ort.InferenceSession(model, options_for(library), providers=["CPUExecutionProvider"], enable_fallback=0)
    except Exception:  # any rejection, and UnicodeDecodeError for messages that hold mutated bytes
        return None


def run_counted(session: ort.InferenceSession, inputs: Inputs, counts: Counter[str]) -> None:
    counts["runs"] += 1
    try:
        session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
    except Exception:
        return
    counts["results"] += 1


def run_mutated(rng: np.random.Generator, file: str, library: str, counts: Counter[str]) -> None:
    """A model some of whose bytes, or attributes, are wrong."""
    op = OPERATORS[file].schema
    inputs, attributes = valid_case(rng, file)
    weights = {name: array for name, array in inputs.items() if name not in ("x", "routing_x", "tile_idx", "weight")}
    constants = weights if rng.random() < 0.5 else {}
    left_out = optional_outputs(op) if rng.random() < 0.5 else []
    if rng.random() < 0.3:
        model = make_model(op, constants=constants, left_out=left_out, **spoil_attributes(rng, attributes)).SerializeToString()
    else:
        model = mutate(rng, make_model(op, constants=constants, left_out=left_out, **attributes).SerializeToString())
    counts["mutated"] += 1
    session = session_or_none(model, library)
    if session is not None:
        counts["loaded"] += 1
        run_counted(session, inputs, counts)


def run_valid(rng: np.random.Generator, file: str, library: str, counts: Counter[str]) -> None:
    """A valid model: once with valid inputs, which must give a result, and with spoiled ones."""
    op = OPERATORS[file].schema
    inputs, attributes = valid_case(rng, file)
    left_out = optional_outputs(op) if rng.random() < 0.5 else []
    session = session_or_none(make_model(op, dims=UNKNOWN_RANKS, left_out=left_out, **attributes).SerializeToString(), library)
    assert session is not None, f"{op.name} {attributes}"
    session.run(None, inputs)
    counts["valid"] += 1
    for _ in range(3):
        run_counted(session, spoil(rng, inputs), counts)


def optional_outputs(op: OpSchema) -> list[str]:
    return [tensor.name for tensor in op.outputs if tensor.is_optional]


def run_case(case: int, seed: int, library: str, counts: dict[str, Counter[str]]) -> None:
    print(f"case {case}", flush=True)
    rng = np.random.default_rng([seed, case])
    file = FILES[case % len(FILES)]
    run = run_mutated if rng.random() < 0.5 else run_valid
    run(rng, file, library, counts[OPERATORS[file].schema.name])


def main(library: str, seed: int, seconds: float, case: int | None = None) -> None:
    counts = {operator.schema.name: Counter[str]() for operator in OPERATORS.values()}
    if case is not None:
        run_case(case, seed, library, counts)
        return
    start, case = time.monotonic(), 0
    while time.monotonic() < start + seconds:
        run_case(case, seed, library, counts)
        case += 1
    for name, count in counts.items():
        print(f"{name}: {summary(count)}")
    print(f"in all: {summary(sum(counts.values(), Counter()))}; seed {seed}, {time.monotonic() - start:.0f} s")


def summary(count: Counter[str]) -> str:
    mutated = f"{count['mutated']} mutated models, {count['mutated'] - count['loaded']} refused"
    inputs = f"{count['runs']} inputs that may be wrong, {count['runs'] - count['results']} refused"
    return f"{mutated}; {count['valid']} valid models, all ran; {inputs}"


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))
