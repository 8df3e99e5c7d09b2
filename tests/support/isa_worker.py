"""A process whose kernels run one instruction set: for each case file named on stdin, run it and write the results.

A case file (.npz) holds the inputs of one op, and its attributes as numbers without dimensions. A name that it alone has says
which op, no such name TernaryMatMul. `without_score` leaves out the scores of SignatureRoute. The answer to each line is the
path of a .npz with the outputs. TRIX_ORT_ISA is read once per process, hence one worker for each value.
"""

import sys
from collections.abc import Collection

import numpy as np
import onnxruntime as ort
from packed_models import make_model, native_session

from ort_ops.operators.resolvent_mix import RESOLVENT_MIX
from ort_ops.operators.resolvent_sweep import RESOLVENT_SWEEP
from ort_ops.operators.signature_route import SIGNATURE_ROUTE
from ort_ops.operators.sparse_lookup import SPARSE_LOOKUP
from ort_ops.operators.ternary_matmul import TERNARY_MATMUL
from ort_ops.operators.ternary_tile_matmul import TERNARY_TILE_MATMUL

NAMED_BY = {"alpha_re": RESOLVENT_SWEEP, "G_re": RESOLVENT_MIX, "grid_size": SPARSE_LOOKUP, "top_k": SIGNATURE_ROUTE}
NAMED_BY |= {"tile_idx": TERNARY_TILE_MATMUL}
sessions: dict[tuple[str, frozenset[tuple[str, float]]], ort.InferenceSession] = {}


def session_for(names: Collection[str], attributes: dict[str, float]) -> ort.InferenceSession:
    op = next((op for name, op in NAMED_BY.items() if name in names), TERNARY_MATMUL)
    key = op.name, frozenset(attributes.items())
    if key not in sessions:
        given = {name: value for name, value in attributes.items() if name != "without_score"}
        left_out = ("score",) if attributes.get("without_score") else ()
        sessions[key] = native_session(make_model(op, left_out=left_out, **given))
    return sessions[key]


for line in sys.stdin:
    with np.load(line.strip()) as case:
        arrays = {name: case[name] for name in case.files}
    session = session_for(arrays, {name: value.item() for name, value in arrays.items() if value.ndim == 0})
    inputs = {name: value for name, value in arrays.items() if value.ndim > 0}
    outputs = dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))
    result = f"{line.strip()}.{id(session)}.result.npz"
    np.savez(result, **outputs)
    print(result, flush=True)
