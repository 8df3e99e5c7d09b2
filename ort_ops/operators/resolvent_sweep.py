"""The operator ResolventSweep: the pivots of a tridiagonal operator, token by token.

Legend: B batch, H heads, T tokens.
"""

from typing import Any

import numpy as np
from onnx import FunctionProto

from ort_ops.graph_nodes import ONNX_OPSET, as_function, node, scan_tokens
from ort_ops.operators.checks import NUM_TOKENS, Array, Run, relative_error
from ort_ops.operators.operator import Operator, Translation
from ort_ops.schema import DOMAIN, OPSET_VERSION, OpSchema, TensorSchema

RESOLVENT_SWEEP = OpSchema(
    name="ResolventSweep",
    inputs=(
        TensorSchema("alpha_re", "float32", ("B", "H", "T")),
        TensorSchema("alpha_im", "float32", ("B", "H", "T")),
        TensorSchema("w", "float32", ("B", "H", "T")),
        TensorSchema("first_re", "float32", ("B", "H")),
        TensorSchema("first_im", "float32", ("B", "H")),
    ),
    outputs=(
        TensorSchema("G_re", "float32", ("B", "H", "T")),
        TensorSchema("G_im", "float32", ("B", "H", "T")),
    ),
    attributes=(),
    doc=(
        "G[b, h, t] = 1 / (alpha[b, h, t] - w[b, h, t] G[b, h, t - 1]) with G[b, h, -1] = first[b, h]. Complex numbers come as "
        "real (re) and imaginary part (im). Nothing is clamped. The last G is the first of the tokens that follow."
    ),
)


def _function() -> FunctionProto:
    step = [
        node("Mul", ["w_t", "before_re"], ["pull_re"]),
        node("Mul", ["w_t", "before_im"], ["pull_im"]),
        node("Sub", ["alpha_re_t", "pull_re"], ["d_re"]),
        node("Sub", ["alpha_im_t", "pull_im"], ["d_im"]),
        node("Mul", ["d_re", "d_re"], ["square_re"]),
        node("Mul", ["d_im", "d_im"], ["square_im"]),
        node("Add", ["square_re", "square_im"], ["square"]),
        node("Div", ["d_re", "square"], ["G_re_t"]),
        node("Neg", ["d_im"], ["opposite_im"]),
        node("Div", ["opposite_im", "square"], ["G_im_t"]),
        node("Identity", ["G_re_t"], ["after_re"]),
        node("Identity", ["G_im_t"], ["after_im"]),
    ]
    states = [(f"first_{part}", f"before_{part}", f"after_{part}", f"last_{part}") for part in ("re", "im")]
    read = [(name, f"{name}_t") for name in ("alpha_re", "alpha_im", "w")]
    written = [("G_re_t", "G_re"), ("G_im_t", "G_im")]
    without_tokens = {"G_re": "alpha_re", "G_im": "alpha_im", "last_re": "first_re", "last_im": "first_im"}
    return as_function(RESOLVENT_SWEEP, scan_tokens(step, states, read, written, without_tokens, 2, 2))


def _check(run: Run) -> float:
    rng = np.random.default_rng(5)
    shape = (2, 3, NUM_TOKENS)
    alpha_re, eta, w = rng.standard_normal(shape), rng.uniform(0.1, 1.0, shape), rng.uniform(0.0, 2.0, shape)
    alpha, first = alpha_re - 1j * eta, rng.standard_normal(shape[:2]) + 1j * rng.random(shape[:2])
    parts = {"alpha_re": alpha.real, "alpha_im": alpha.imag, "w": w, "first_re": first.real, "first_im": first.imag}
    feeds: dict[str, Array] = {name: part.astype(np.float32) for name, part in parts.items()}
    exact = {name: part.astype(np.float64) for name, part in feeds.items()}
    alpha, G = exact["alpha_re"] + 1j * exact["alpha_im"], exact["first_re"] + 1j * exact["first_im"]
    G_BHT = np.empty(shape, np.complex128)
    for t in range(NUM_TOKENS):
        G_BHT[..., t] = G = 1.0 / (alpha[..., t] - exact["w"][..., t] * G)
    found_re, found_im = run(RESOLVENT_SWEEP, feeds)
    errors = relative_error(found_re, G_BHT.real), relative_error(found_im, G_BHT.imag)
    return float(np.max(errors))  # NaN where one is


def _translations() -> dict[Any, Translation]:
    import torch
    from onnxscript.values import Opset

    import trix.functional.resolvent  # noqa: F401  defines the operator

    opset, standard = Opset(DOMAIN, OPSET_VERSION), Opset("", ONNX_OPSET)

    def translate(alpha_re: Any, alpha_im: Any, w: Any, first_re: Any, first_im: Any) -> Any:
        if len(alpha_re.shape) == 3:
            return opset.ResolventSweep(alpha_re, alpha_im, w, first_re, first_im)
        # torch's operator takes [..., T]: all other axes become H.
        rows = standard.Concat(standard.Constant(value_ints=[1, -1]), standard.Shape(alpha_re, start=-1), axis=0)
        of_tokens = (standard.Reshape(x, rows) for x in (alpha_re, alpha_im, w))
        of_rows = (standard.Reshape(x, standard.Constant(value_ints=[1, -1])) for x in (first_re, first_im))
        G = opset.ResolventSweep(*of_tokens, *of_rows)
        return tuple(standard.Reshape(part, standard.Shape(alpha_re)) for part in G)

    return {torch.ops.trix.resolvent_sweep.default: translate}


OPERATOR = Operator(RESOLVENT_SWEEP, _function, _check, _translations)
