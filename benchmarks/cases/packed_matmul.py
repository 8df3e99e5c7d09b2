"""The packed ternary operator against onnxruntime's float32 MatMul of the same matrix, one thread, by number of tokens.

Both run in one process and take turns, so each evicts the other's weights from the caches: thread CPU time, median. Inputs
are aligned to 64 bytes, as onnxruntime's own tensors are. Parity of the results is checked first.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ort_ops.library import session_options
from ort_ops.schema import DOMAIN, OPSET_VERSION, TERNARY_TILE_MATMUL

Run = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sizes", type=int, nargs="+", default=[2048, 4096], help="K = N (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 32, 128], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=15, help="timed runs of each (default: %(default)s)")


def run(sizes: list[int], tokens: list[int], repeats: int) -> list[dict[str, Any]]:
    results = []
    for size in sizes:
        packed, dense, weight = sessions(size)
        for num_tokens in tokens:
            x = aligned(np.random.default_rng(num_tokens).standard_normal((num_tokens, size), dtype=np.float32))
            feeds = {"x": x, "tile_idx": np.zeros(num_tokens, dtype=np.int64)}
            np.testing.assert_allclose(packed.run(None, feeds)[0], x @ weight, rtol=1e-3, atol=1e-2)
            pair = (partial(packed.run, None, feeds), partial(dense.run, None, {"x": x}))
            results.append({"size": size, "tokens": num_tokens, **interleaved(*pair, repeats)})
    return results


def interleaved(packed: Run, dense: Run, repeats: int) -> dict[str, Any]:
    packed_s, dense_s = [], []
    for _ in range(repeats):
        packed_s.append(thread_seconds(packed))
        dense_s.append(thread_seconds(dense))
    ratios = [d / p for d, p in zip(dense_s, packed_s, strict=True)]
    return {
        "packed_us": statistics.median(packed_s) * 1e6,
        "float32_us": statistics.median(dense_s) * 1e6,
        "float32_over_packed": statistics.median(ratios),
        "float32_over_packed_quartiles": statistics.quantiles(ratios, n=4)[::2],
    }


def thread_seconds(function: Run) -> float:
    start = time.thread_time()
    function()
    return time.thread_time() - start


def sessions(size: int) -> tuple[ort.InferenceSession, ort.InferenceSession, NDArray[np.float32]]:
    rng = np.random.default_rng(size)
    codes = rng.integers(-1, 2, (size, size), dtype=np.int8)
    scale = rng.uniform(0.5, 1.5, (1, size)).astype(np.float32)
    fields = np.where(codes < 0, 2, codes).astype(np.uint8).reshape(1, size, size // 4, 4)
    packed = fields @ np.array([1, 4, 16, 64], dtype=np.uint8)
    weight = np.ascontiguousarray((codes * scale[0][:, None]).T.astype(np.float32))
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", size])
    idx = helper.make_tensor_value_info("tile_idx", TensorProto.INT64, ["T"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["T", size])
    ternary = helper.make_node(TERNARY_TILE_MATMUL.name, ["x", "packed", "row_scale", "tile_idx"], ["y"], domain=DOMAIN)
    matmul = helper.make_node("MatMul", ["x", "weight"], ["y"])
    constants = [numpy_helper.from_array(packed, "packed"), numpy_helper.from_array(scale, "row_scale")]
    graphs = [
        helper.make_graph([ternary], "packed", [x, idx], [y], constants),
        helper.make_graph([matmul], "dense", [x], [y], [numpy_helper.from_array(weight, "weight")]),
    ]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    options = session_options(intra_op_num_threads=1)
    made = [
        ort.InferenceSession(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString(), options)
        for graph in graphs
    ]
    return made[0], made[1], weight


def aligned(values: NDArray[np.float32]) -> NDArray[np.float32]:
    buffer = np.empty(values.size + 16, dtype=np.float32)
    offset = -buffer.ctypes.data % 64 // 4
    result = buffer[offset : offset + values.size].reshape(values.shape)
    result[:] = values
    return result


def table(results: list[dict[str, Any]]) -> str:
    rows = ["| K = N | tokens | packed us | float32 us | float32 / packed (quartiles) |", "|---|---|---|---|---|"]
    for result in results:
        low, high = result["float32_over_packed_quartiles"]
        rows.append(
            f"| {result['size']} | {result['tokens']} | {result['packed_us']:.0f} | {result['float32_us']:.0f} "
            f"| {result['float32_over_packed']:.2f} ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(rows)
