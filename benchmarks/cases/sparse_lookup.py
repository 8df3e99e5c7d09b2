"""Sparse lookup layers in onnxruntime: the operators of ai.trix against the same file in ONNX's own operators.

Layers of both kinds (grid and hinges), one node each, in stacks, so that what a run costs by itself counts little. The
plain contender is the same model without the library: its portable functions, inlined and optimised by onnxruntime. Both take
turns in one process; one thread, its time on the CPU, medians of --repeats turns.
"""

import argparse
import statistics
from functools import partial
from typing import Any

import numpy as np
import onnx
from cases.kernels import interleaved
from kernel_models import session
from onnx import TensorProto, helper, numpy_helper

from ort_ops.operators import fallback_functions
from ort_ops.operators.sparse_lookup import SPARSE_LOOKUP
from ort_ops.panels import to_panels
from ort_ops.schema import DOMAIN, OPSET_VERSION

# How many times as fast a layer should be, by (width, tokens).
TARGETS = {(128, 1): 20.0, (512, 1): 4.0, (128, 128): 1.5, (512, 128): 1.5}
KINDS = ("grid", "hinges")
DEPTH = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=9, help="turns of each contender (default: %(default)s)")


def run(repeats: int) -> dict[str, Any]:
    if repeats < 5:
        raise SystemExit(f"repeats ({repeats}) must be >= 5")
    return {"layers": [measure(kind, *size, repeats) for kind in KINDS for size in TARGETS]}


def measure(kind: str, width: int, num_tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds are those of one layer."""
    model = layers(width, KINDS.index(kind))
    x = np.random.default_rng(0).standard_normal((num_tokens, width), dtype=np.float32)
    runs = {name: partial(session(model, 1, name == "ours").run, None, {"x": x}) for name in ("ours", "plain")}
    times = interleaved(runs, repeats, is_wall=False)
    ours_s, plain_s = (statistics.median(times[name]) / DEPTH for name in runs)
    return {"kind": kind, "width": width, "tokens": num_tokens, "ours_s": ours_s, "plain_s": plain_s}


def layers(width: int, has_hinges: int, num_tiles: int = 64, grid_size: int = 16) -> onnx.ModelProto:
    """A stack of layers with constants of their own."""
    rng = np.random.default_rng(1)
    num_hidden, spline_size = width // 4, 4 * grid_size + 1 if has_hinges else (grid_size + 1) ** 2
    shapes = {
        "compress": (width, num_hidden),
        "compress_bias": (num_hidden,),
        "point_weight": (2, num_hidden),
        "point_bias": (2,),
        "splines": (num_tiles, spline_size),
        "direction": (num_tiles, width),
    }
    nodes, constants = [], {}
    for layer in range(DEPTH):
        own = {name: rng.standard_normal(shape, dtype=np.float32) / np.float32(width**0.5) for name, shape in shapes.items()}
        own |= {"gate_curve": np.linspace(0.0, 1.0, 8, dtype=np.float32), "bias": np.zeros(num_tiles, np.float32)}
        own |= {"norm_weight": np.ones(width, np.float32), "norm_bias": np.zeros(width, np.float32)}
        own |= {"signatures": to_panels(rng.integers(-1, 2, (num_tiles, width), dtype=np.int8))}
        constants |= {f"{name}_{layer}": array for name, array in own.items()}
        x, y = "x" if layer == 0 else f"y_{layer - 1}", "y" if layer + 1 == DEPTH else f"y_{layer}"
        name = {value: f"{value}_{layer}" for value in (*own, "tile_idx")} | {"x": x, "routing_x": x, "y": y}
        lookup = [[name[tensor.name] for tensor in tensors] for tensors in (SPARSE_LOOKUP.inputs, SPARSE_LOOKUP.outputs)]
        attributes = {"grid_size": grid_size, "has_hinges": has_hinges}
        nodes.append(helper.make_node(SPARSE_LOOKUP.name, *lookup, domain=DOMAIN, **attributes))
    values = [onnx.ValueInfoProto(name="y")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", width])]
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "lookups", inputs, values, initializers)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, OPSET_VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    model.functions.extend(fallback_functions())
    return model


def table(results: dict[str, Any]) -> str:
    lines = ["| layer | D | tokens | us a layer | plain operators | times as fast as they |", "|---|---|---|---|---|---|"]
    for row in results["layers"]:
        goal = TARGETS[row["width"], row["tokens"]]
        lines.append(
            f"| {row['kind']} | {row['width']} | {row['tokens']} | {row['ours_s'] * 1e6:.1f} | {row['plain_s'] * 1e6:.1f} "
            f"| {row['plain_s'] / row['ours_s']:.1f} (goal {goal:g}) |"
        )
    return "\n".join(lines)
