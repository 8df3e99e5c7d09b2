"""The operator ResolventMix: a complex linear recurrence over the tokens with a matrix as the state of each head.

Legend: B batch, H heads, T tokens, N width of a query, P channels per head.
"""

from typing import Any

import numpy as np
from onnx import FunctionProto, numpy_helper

from ort_ops.graph_nodes import ONNX_OPSET, as_function, int_vector, node, scan_tokens
from ort_ops.operators.checks import NUM_TOKENS, Array, Run, relative_error
from ort_ops.operators.operator import Operator, Translation
from ort_ops.schema import DOMAIN, OPSET_VERSION, OpSchema, TensorSchema

RESOLVENT_MIX = OpSchema(
    name="ResolventMix",
    inputs=(
        TensorSchema("G_re", "float32", ("B", "H", "T")),
        TensorSchema("G_im", "float32", ("B", "H", "T")),
        TensorSchema("c_re", "float32", ("B", "H", "T")),
        TensorSchema("c_im", "float32", ("B", "H", "T")),
        TensorSchema("u", "float32", ("B", "H", "T", "P")),
        TensorSchema("q", "float32", ("B or 1", "H or 1", "T or 1", "N")),
        TensorSchema("k", "float32", ("B or 1", "H or 1", "T or 1", "N")),
        TensorSchema("first_re", "float32", ("B", "H", "N", "P")),
        TensorSchema("first_im", "float32", ("B", "H", "N", "P")),
    ),
    outputs=(
        TensorSchema("y_re", "float32", ("B", "H", "T", "P")),
        TensorSchema("y_im", "float32", ("B", "H", "T", "P")),
        TensorSchema("last_re", "float32", ("B", "H", "N", "P")),
        TensorSchema("last_im", "float32", ("B", "H", "N", "P")),
    ),
    attributes=(),
    doc=(
        "S[t, n, p] = -c[t] G[t] S[t - 1, n, p] + k[t, n] G[t] u[t, p] and y[t, p] = sum_n q[t, n] S[t, n, p] for each text "
        "and head, with S[-1] = first; last is S after the last token, the first of those that follow. Complex numbers come as "
        "real (re) and imaginary part (im). Axes of q and k that are 1 are shared; ones [1, 1, 1, 1] make S a vector, y = S. "
        "N >= 1. Nothing is clamped."
    ),
)


def _function() -> FunctionProto:
    """A Scan over the tokens, with decay = -c G and drive = G u computed for all at once."""
    step = [
        *(node("Unsqueeze", [f"decay_{part}_t", "state_axes"], [f"factor_{part}"]) for part in ("re", "im")),
        *(node("Unsqueeze", [f"{name}_t", "last_axis"], [f"{name}_column"]) for name in ("q", "k")),
    ]
    for part, other, join in (("re", "im", "Sub"), ("im", "re", "Add")):
        step += [
            node("Mul", [f"before_{part}", "factor_re"], [f"own_{part}"]),
            node("Mul", [f"before_{other}", "factor_im"], [f"turned_{part}"]),
            node(join, [f"own_{part}", f"turned_{part}"], [f"kept_{part}"]),
            node("Unsqueeze", [f"drive_{part}_t", "row_axis"], [f"drive_{part}_row"]),
            node("Mul", [f"drive_{part}_row", "k_column"], [f"written_{part}"]),
            node("Add", [f"kept_{part}", f"written_{part}"], [f"after_{part}"]),
            node("Mul", [f"after_{part}", "q_column"], [f"read_{part}"]),
            node("ReduceSum", [f"read_{part}", "row_axis"], [f"y_{part}_t"], keepdims=0),
        ]
    states = [(f"first_{part}", f"before_{part}", f"after_{part}", f"last_{part}") for part in ("re", "im")]
    read = [(f"{name}_{part}", f"{name}_{part}_t") for name in ("decay", "drive") for part in ("re", "im")]
    read += [("every_q", "q_t"), ("every_k", "k_t")]
    without_tokens = {"y_re": "u", "y_im": "u", "last_re": "first_re", "last_im": "first_im"}
    nodes = [
        int_vector("last_axis", [-1]),
        int_vector("row_axis", [2]),
        int_vector("state_axes", [2, 3]),
        *_product("c", "G", "turn"),
        node("Neg", ["turn_re"], ["decay_re"]),
        node("Neg", ["turn_im"], ["decay_im"]),
        # A Scan reads as many queries as tokens.
        node("Shape", ["G_re"], ["token_axis"], start=2, end=3),
        int_vector("one", [1]),
        node("Concat", ["one", "one", "token_axis", "one"], ["all_tokens"], axis=0),
        *(node("Expand", [name, "all_tokens"], [f"every_{name}"]) for name in ("q", "k")),
        *(node("Unsqueeze", [f"G_{part}", "last_axis"], [f"G_{part}_column"]) for part in ("re", "im")),
        *(node("Mul", [f"G_{part}_column", "u"], [f"drive_{part}"]) for part in ("re", "im")),
        *scan_tokens(step, states, read, [("y_re_t", "y_re"), ("y_im_t", "y_im")], without_tokens, 4, 3),
    ]
    return as_function(RESOLVENT_MIX, nodes)


def _product(one: str, other: str, product: str) -> list[Any]:
    """product = one * other, complex."""
    return [
        *(node("Mul", [f"{one}_{a}", f"{other}_{b}"], [f"{product}_{a}_{b}"]) for a in ("re", "im") for b in ("re", "im")),
        node("Sub", [f"{product}_re_re", f"{product}_im_im"], [f"{product}_re"]),
        node("Add", [f"{product}_re_im", f"{product}_im_re"], [f"{product}_im"]),
    ]


def _check(run: Run) -> float:
    """Queries of the heads' own, keys that they share."""
    rng = np.random.default_rng(6)
    B, H, N, P = 2, 3, 5, 11
    feeds: dict[str, Array] = {
        **{name: rng.standard_normal((B, H, NUM_TOKENS), dtype=np.float32) for name in ("G_re", "G_im", "c_re", "c_im")},
        "u": rng.standard_normal((B, H, NUM_TOKENS, P), dtype=np.float32),
        "q": rng.standard_normal((B, H, NUM_TOKENS, N), dtype=np.float32),
        "k": rng.standard_normal((B, 1, NUM_TOKENS, N), dtype=np.float32),
        **{name: rng.standard_normal((B, H, N, P), dtype=np.float32) for name in ("first_re", "first_im")},
    }
    for name in ("G_re", "G_im"):
        feeds[name] *= np.float32(0.4)  # so that the state does not grow
    outputs = run(RESOLVENT_MIX, feeds)
    x = {name: array.astype(np.float64) for name, array in feeds.items()}
    G, c, S = (x[f"{name}_re"] + 1j * x[f"{name}_im"] for name in ("G", "c", "first"))
    y = np.empty((B, H, NUM_TOKENS, P), np.complex128)
    for t in range(NUM_TOKENS):
        drive = x["k"][:, :, t, :, None] * x["u"][:, :, t, None, :]
        S = G[:, :, t, None, None] * (drive - c[:, :, t, None, None] * S)
        y[:, :, t] = (x["q"][:, :, t, :, None] * S).sum(axis=2)
    expected = (y.real, y.imag, S.real, S.imag)
    errors = [relative_error(found, exact) for found, exact in zip(outputs, expected, strict=True)]
    return float(np.max(errors))  # NaN where one is


def _translations() -> dict[Any, Translation]:
    import torch
    from onnxscript.values import Opset

    import trix.functional.resolvent_mix  # noqa: F401  defines the operators

    opset, standard = Opset(DOMAIN, OPSET_VERSION), Opset("", ONNX_OPSET)

    def matrix(*inputs: Any) -> Any:
        return opset.ResolventMix(*inputs)

    def vector(G_re: Any, G_im: Any, c_re: Any, c_im: Any, u: Any, first_re: Any, first_im: Any) -> Any:
        one = standard.Constant(value=numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32)))
        row = standard.Constant(value_ints=[2])
        first = (standard.Unsqueeze(part, row) for part in (first_re, first_im))
        y_re, y_im, *last = opset.ResolventMix(G_re, G_im, c_re, c_im, u, one, one, *first)
        return y_re, y_im, *(standard.Squeeze(part, row) for part in last)

    return {torch.ops.trix.resolvent_mix_matrix.default: matrix, torch.ops.trix.resolvent_mix.default: vector}


OPERATOR = Operator(RESOLVENT_MIX, _function, _check, _translations)
