"""The packed operators in a real session against what else a user could pick, on the same product.

Products: y = x W with W ternary, by size, number of tokens and threads; weights hot (in the cache, where they fit) or cold: in
a stack of so many products, each with weights of its own, that no cache holds them, as when a large model generates. Ours with
activations of 8 bits (a scale per token or per 128 columns) and of 24 bits; onnxruntime's float32 MatMul, dynamic int8, and
MatMulNBits with 4 bits in blocks of 32 and 2 bits in blocks of 128 (accuracy_level 4); torch in float32, bfloat16 and dynamic
int8. Tiles: a layer of 4 or 16 tiles, one for each token, against our own dense layer of as many hidden values, routing
included. Routing: the best of many signatures against float32 MatMul and ArgMax.

All contenders of a row take turns in one process; sessions have inputs and outputs bound, so that nothing is copied. Time is
that of the calling thread on the CPU with one thread, wall time with more; medians of --repeats turns. The limit is measured
beside it (benchmarks/native/limits.cpp; needs a C++ compiler).
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from cpu_limits import limits
from kernel_models import OURS, PRODUCTS, SCALE, Run, argmax, bind, graph_model, layer, route, session, stacked
from matplotlib.figure import Figure
from rich.progress import track

SIZES = ((4096, 4096), (4096, 11008), (512, 2048))
TOKENS = (1, 8, 64, 256)
# How many times as fast "trix 8 bit" should be, K = N = 4096, one thread, by (cache, tokens).
TARGETS = {
    ("hot", 1): {"ort float32": 35.0, "ort 4 bit, 32": 5.5, "ort 2 bit, 128": 2.5},
    ("cold", 1): {"ort float32": 21.0, "ort 4 bit, 32": 4.2, "ort 2 bit, 128": 2.6},
    ("hot", 8): {"ort float32": 8.0, "ort 4 bit, 32": 3.8, "ort 2 bit, 128": 2.4},
    ("hot", 64): {"ort float32": 4.5, "ort 4 bit, 32": 2.8, "ort 2 bit, 128": 2.0, "ort int8": 1.15},
    ("hot", 256): {"ort float32": 4.5, "ort 4 bit, 32": 2.8, "ort 2 bit, 128": 2.0, "ort int8": 1.15},
}
TILE_TARGETS = {(4, 1): 3.3, (16, 1): 9.5, (4, 256): 3.5, (16, 256): 10.0}
ROUTE_TARGETS = {64: 2.5, 1024: 9.0, 16384: 15.0}
COLD_BYTES = 192 << 20  # of weights in a stack
MIN_SECONDS = 2e-3  # a turn repeats short runs up to it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS), help="default: %(default)s")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--no-torch", action="store_true", help="leave out torch, which is slow with many tokens")


def run(repeats: int, tokens: list[int], threads: list[int], no_torch: bool) -> dict[str, Any]:
    if repeats < 5:
        raise SystemExit(f"repeats ({repeats}) must be >= 5")
    torch.set_grad_enabled(False)
    measured_limits = limits()
    # First, beside the limit: a program that has just loaded its model gets large pages more often than one that has run long.
    products = [measure_cold(repeats)]
    cases = [(size, num_threads) for num_threads in threads for size in SIZES]
    for size, num_threads in track(cases, "products"):
        products += measure_products(size, tokens, num_threads, repeats, not no_torch)
    return {
        "limits": measured_limits,
        "products": products,
        "tiles": measure_tiles(repeats),
        "routing": measure_routing(repeats),
        "memory": measure_memory(),
    }


def measure_products(
    size: tuple[int, int], tokens: list[int], num_threads: int, repeats: int, has_torch: bool
) -> list[dict[str, Any]]:
    """One row for each number of tokens and each state of the cache."""
    num_columns, num_rows = size
    rng = np.random.default_rng(0)
    weight_NK = rng.integers(-1, 2, (num_rows, num_columns), dtype=np.int8)
    contenders = {**sessions(weight_NK, num_threads), **(torch_products(weight_NK, num_threads) if has_torch else {})}
    rows = []
    for num_tokens in tokens:
        x = rng.standard_normal((num_tokens, num_columns), dtype=np.float32)
        runs = {name: bind(x) for name, bind in contenders.items()}
        exact = x @ (weight_NK.T * np.float32(SCALE))
        for name in OURS:
            error = np.sqrt(np.mean((runs[name]()[0].numpy() - exact) ** 2) / np.mean(exact**2))
            assert error < (1e-5 if "24" in name else 0.02), (name, error)
        times = interleaved(runs, repeats, is_wall=num_threads > 1)
        rows.append(_row(size, num_tokens, num_threads, "hot", times))
    return rows


def measure_cold(repeats: int, size: int = 4096) -> dict[str, Any]:
    """One token through stacks of products; seconds are those of one product."""
    weight = np.random.default_rng(5).integers(-1, 2, (size, size), dtype=np.int8)
    x = np.random.default_rng(6).standard_normal((1, size), dtype=np.float32)
    runs, depth = {}, {}
    for name, make in PRODUCTS.items():
        node, constants, inputs = make(weight)
        bytes_each = sum(array.nbytes for array in constants.values())
        depth[name] = max(3, -(-COLD_BYTES // bytes_each))
        made = session(stacked(node, constants, inputs, depth[name]), 1, name in OURS)
        runs[name] = bind(made, x)
    times = interleaved(runs, repeats, is_wall=False)
    return _row((size, size), 1, 1, "cold", {name: [s / depth[name] for s in times[name]] for name in times})


def _row(size: tuple[int, int], num_tokens: int, num_threads: int, cache: str, times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "columns": size[0],
        "rows": size[1],
        "tokens": num_tokens,
        "threads": num_threads,
        "cache": cache,
        "seconds": {name: statistics.median(of_name) for name, of_name in times.items()},
        "quartiles": {name: statistics.quantiles(of_name, n=4)[::2] for name, of_name in times.items()},
    }


def interleaved(runs: dict[str, Run], repeats: int, is_wall: bool) -> dict[str, list[float]]:
    clock = time.perf_counter if is_wall else time.thread_time
    counts = {}
    for name, one in runs.items():
        one()
        start = time.perf_counter()
        one()
        counts[name] = max(1, int(MIN_SECONDS / max(time.perf_counter() - start, 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, one in runs.items():
            one()  # whatever the contender before it has pushed out of the cache is back
            start = clock()
            for _ in range(counts[name]):
                one()
            times[name].append((clock() - start) / counts[name])
    return times


def sessions(weight_NK: np.ndarray, num_threads: int) -> dict[str, Callable[[np.ndarray], Run]]:
    """By contender, what binds an input to a run."""
    found: dict[str, Callable[[np.ndarray], Run]] = {}
    for name, make in PRODUCTS.items():
        node, constants, inputs = make(weight_NK)
        made = session(graph_model([node], constants, inputs), num_threads, name in OURS)
        found[name] = partial(bind, made)
    return found


def torch_products(weight_NK: np.ndarray, num_threads: int) -> dict[str, Callable[[np.ndarray], Run]]:
    torch.set_num_threads(num_threads)
    linear = torch.nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False)
    linear.weight.data.copy_(torch.from_numpy(weight_NK * np.float32(SCALE)))
    half = torch.nn.Linear(weight_NK.shape[1], weight_NK.shape[0], bias=False, dtype=torch.bfloat16)
    half.weight.data.copy_(linear.weight)
    int8 = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), {torch.nn.Linear}, dtype=torch.qint8)
    return {
        "torch float32": lambda x: partial(linear, torch.from_numpy(x)),
        "torch bfloat16": lambda x: partial(half, torch.from_numpy(x).bfloat16()),
        "torch int8": lambda x: partial(int8, torch.from_numpy(x)),
    }


def measure_tiles(repeats: int, size: int = 4096) -> list[dict[str, Any]]:
    """A layer of E tiles, one for each token, chosen by its signature, against our own dense layer of as many hidden values."""
    rng = np.random.default_rng(1)
    up, down = (rng.integers(-1, 2, (size, size), dtype=np.int8) for _ in range(2))
    dense = session(layer(up, down, 1), 1, True)
    rows = []
    for num_tiles in (4, 16):
        routed = session(layer(up, down, num_tiles), 1, True)
        for num_tokens in (1, 256):
            x = rng.standard_normal((num_tokens, size), dtype=np.float32)
            times = interleaved({"dense": bind(dense, x), "routed": bind(routed, x)}, repeats, is_wall=False)
            dense_s, routed_s = (statistics.median(times[name]) for name in ("dense", "routed"))
            rows.append({"tiles": num_tiles, "tokens": num_tokens, "dense_s": dense_s, "routed_s": routed_s})
    return rows


def measure_routing(repeats: int, width: int = 4096) -> list[dict[str, Any]]:
    rng = np.random.default_rng(2)
    rows = []
    for num_tiles in ROUTE_TARGETS:
        signatures = rng.integers(-1, 2, (num_tiles, width), dtype=np.int8)
        norm = np.sqrt(np.maximum(np.abs(signatures).sum(-1, dtype=np.int64), 1)).astype(np.float32)
        table = np.ascontiguousarray((signatures / norm[:, None]).T.astype(np.float32))
        runs = {
            "ours": bind(session(route(signatures), 1, True), x := rng.standard_normal((1, width), dtype=np.float32)),
            "float32": bind(session(argmax(table), 1, False), x),
        }
        times = interleaved(runs, repeats, is_wall=False)
        ours_s, float32_s = (statistics.median(times[name]) for name in runs)
        rows.append({"tiles": num_tiles, "ours_s": ours_s, "float32_s": float32_s})
    return rows


def measure_memory(size: int = 4096, num_layers: int = 32) -> dict[str, Any]:
    """Resident memory of a session beside its packed weights, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        weight = np.random.default_rng(3).integers(-1, 2, (size, size), dtype=np.int8)
        onnx.save(stacked(*PRODUCTS["trix 8 bit"](weight), num_layers), path)
        command = [sys.executable, "-c", _MEMORY_CODE, str(path), str(size)]
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    return {"packed_bytes": num_layers * size * size // 4, "resident_bytes": int(finished.stdout)}


_MEMORY_CODE = """
import resource, sys
import numpy as np, onnxruntime as ort
from ort_ops.library import session_options

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

options = session_options(intra_op_num_threads=1)
before = resident()
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
for _ in range(3):
    session.run(None, {"x": np.ones((1, int(sys.argv[2])), np.float32), "tile_idx": np.zeros(1, np.int64)})
print(resident() - before)
"""


def table(results: dict[str, Any]) -> str:
    lines = [
        "| K x N | threads | tokens | weights | us a token | times as fast as | share of the limit |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results["products"]:
        ours = row["seconds"]["trix 8 bit"]
        goals = TARGETS.get((row["cache"], row["tokens"]), {}) if row["threads"] == 1 and row["rows"] == row["columns"] else {}
        others = ", ".join(
            f"{name} {seconds / ours:.1f}" + (f" (goal {goals[name]:g})" if name in goals else "")
            for name, seconds in row["seconds"].items()
            if name != "trix 8 bit"
        )
        share = share_of_limit(results["limits"], row)
        lines.append(
            f"| {row['columns']} x {row['rows']} | {row['threads']} | {row['tokens']} | {row['cache']} "
            f"| {ours / row['tokens'] * 1e6:.0f} | {others} | {'' if share is None else f'{share:.0%}'} |"
        )
    for row in results["tiles"]:
        ratio, goal = row["dense_s"] / row["routed_s"], TILE_TARGETS[row["tiles"], row["tokens"]]
        us = row["routed_s"] / row["tokens"] * 1e6
        lines.append(
            f"| 1 of {row['tiles']} tiles | 1 | {row['tokens']} | hot | {us:.0f} | own dense {ratio:.1f} (goal {goal:g}) | |"
        )
    for row in results["routing"]:
        ratio, goal = row["float32_s"] / row["ours_s"], ROUTE_TARGETS[row["tiles"]]
        us = row["ours_s"] * 1e6
        lines.append(
            f"| routing, {row['tiles']} tiles | 1 | 1 | hot | {us:.0f} | float32, ArgMax {ratio:.1f} (goal {goal:g}) | |"
        )
    memory = results["memory"]
    lines.append(
        f"\nresident memory of a session / packed weights: {memory['resident_bytes'] / memory['packed_bytes']:.2f} (goal 1.1)"
    )
    return "\n".join(lines)


def share_of_limit(measured: dict[str, float] | None, row: dict[str, Any]) -> float | None:
    """Of the int8 products that the thread can do; of one token with cold weights, of the bytes that it can read."""
    if measured is None or row["threads"] > 1 or not measured["int8_products_per_s"]:
        return None
    num_products = row["columns"] * row["rows"] * row["tokens"]
    if row["cache"] == "cold":
        return float(num_products / 4 / row["seconds"]["trix 8 bit"] / measured["bytes_read_per_s"])
    return float(num_products / row["seconds"]["trix 8 bit"] / measured["int8_products_per_s"])


def figure(results: dict[str, Any]) -> Figure:
    """Roofline: multiply-adds a second against multiply-adds per byte of packed weights, at 4096 x 4096 and one thread."""
    drawn = Figure(figsize=(8.0, 4.8), layout="constrained")
    axis = drawn.subplots()
    rows = [row for row in results["products"] if (row["rows"], row["columns"], row["threads"]) == (4096, 4096, 1)]
    for cache, marker in (("hot", "o"), ("cold", "x")):
        points: dict[str, list[tuple[float, float]]] = {}
        for row in (row for row in rows if row["cache"] == cache):
            for name, seconds in row["seconds"].items():
                points.setdefault(name, []).append((4.0 * row["tokens"], 4096**2 * row["tokens"] / seconds / 1e9))
        for place, (name, of_name) in enumerate(points.items()):
            label = name if cache == "hot" else None
            width = 2.0 if name.startswith("trix") else 1.0
            axis.plot(*zip(*of_name, strict=True), marker=marker, label=label, linewidth=width, color=f"C{place}")
    measured = results["limits"]
    if measured is not None and measured["int8_products_per_s"]:
        ceiling, slope = measured["int8_products_per_s"] / 1e9, measured["bytes_read_per_s"] / 1e9
        edge = ceiling / slope  # multiply-adds per byte from which on products, not memory, are the limit
        axis.plot([3.0, edge], [3.0 * slope, ceiling], "k:", linewidth=0.8, label="memory, limit of cold weights (x)")
        axis.plot([3.0, 1500.0], [ceiling, ceiling], "k--", linewidth=0.8, label="int8 products, limit")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="multiply-adds per byte of packed weights (4 x tokens)",
        ylabel="10^9 multiply-adds a second",
        title="4096 x 4096, one thread, weights in the cache (o) and from memory (x)",
    )
    axis.legend(fontsize=7, ncols=2)
    return drawn
