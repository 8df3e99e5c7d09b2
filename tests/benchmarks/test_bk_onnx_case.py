"""The benchmark of resolvent mixing in onnxruntime: what its contenders compute, and the table of a record."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from cases import bk_onnx

from trix.functional.resolvent import Pair, resolvent_pivots
from trix.functional.resolvent_mix import resolvent_mix

pytestmark = pytest.mark.usefixtures("native_library")
NUM_TOKENS = 20


@pytest.mark.parametrize("query_width", [0, 16])
def test_the_contenders_compute_what_they_are_named_after(query_width: int) -> None:
    runs = bk_onnx.operators(NUM_TOKENS, query_width)
    x = {name: torch.from_numpy(value) for name, value in bk_onnx.mixing_inputs(NUM_TOKENS, query_width).items()}
    G = resolvent_pivots(Pair(x["alpha_re"], x["alpha_im"]), x["w"], method="loop")
    queries = {"q": x["q"], "k": x["k"]} if query_width else {}
    y, _ = resolvent_mix(G, Pair(x["c_re"], x["c_im"]), x["u"], method="loop", **queries)
    for name in ("native", "scan"):
        for found, expected in zip(runs[name]()[:2], y, strict=True):
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.abs().max())


def test_the_fused_attention_is_causal() -> None:
    session = bk_onnx.session(bk_onnx.attention_model(), 1, is_native=False)
    q, k, v = np.random.default_rng(0).standard_normal((3, 1, NUM_TOKENS, 128), dtype=np.float32)
    found = session.run(None, {"q": q, "k": k, "v": v})[0]
    heads = (torch.from_numpy(x).unflatten(-1, (8, 16)).transpose(1, 2) for x in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_table_of_a_record() -> None:
    rows = [
        {"what": "decoding", "state": "matrix", "tokens": 8192, "way": way, "seconds": seconds}
        for way, seconds in (("native", 1e-3), ("attention", 7e-3))
    ]
    assert "| decoding | matrix | 8192 | attention | 7.000 | 7.0 (goal 5) |" in bk_onnx.table(rows)
