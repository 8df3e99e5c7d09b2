"""A process whose kernels run one instruction set: for each case file named on stdin, run it and write the results.

A case file (.npz) holds the inputs of one op; `top_k` beside them says it is SignatureRoute. The answer to each line
is the path of a .npz with the outputs. TRIX_ORT_ISA is read once per process, hence one worker for each value.
"""

import sys

import numpy as np
import onnxruntime as ort
from packed_models import make_model, native_session

from ort_ops.schema import SIGNATURE_ROUTE, TERNARY_TILE_MATMUL

sessions: dict[int | None, ort.InferenceSession] = {}


def session_for(top_k: int | None) -> ort.InferenceSession:
    if top_k not in sessions:
        model = make_model(TERNARY_TILE_MATMUL) if top_k is None else make_model(SIGNATURE_ROUTE, top_k=top_k)
        sessions[top_k] = native_session(model)
    return sessions[top_k]


for line in sys.stdin:
    with np.load(line.strip()) as case:
        inputs = {name: case[name] for name in case.files}
    top_k = inputs.pop("top_k", None)
    session = session_for(None if top_k is None else int(top_k))
    outputs = dict(zip([output.name for output in session.get_outputs()], session.run(None, inputs), strict=True))
    result = f"{line.strip()}.{id(session)}.result.npz"
    np.savez(result, **outputs)
    print(result, flush=True)
