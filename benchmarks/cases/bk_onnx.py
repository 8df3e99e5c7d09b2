"""Resolvent mixing in onnxruntime: the native operators against an exported Scan and against attention.

Operators: a text of --tokens tokens, 8 heads of 16 channels, queries of 16. The kernels of ResolventSweep and ResolventMix; the
same file without the library, a Scan; and onnxruntime's own fused causal attention on the same heads, with what it would be
computed from. Decoding: whole models of random weights, which answer one token after --past others, the resolvent against
attention with its cache, all else the same.

The contenders take turns in one process; one thread, its time on the CPU, medians of --repeats turns.
"""

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from cases.kernels import Run, interleaved
from kernel_models import session
from onnx import TensorProto, helper

from ort_ops.export import export_language_model
from ort_ops.library import session_options
from ort_ops.operators import fallback_functions
from ort_ops.operators.resolvent_mix import RESOLVENT_MIX
from ort_ops.operators.resolvent_sweep import RESOLVENT_SWEEP
from ort_ops.schema import DOMAIN, OPSET_VERSION
from ort_ops.state import empty_state
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig

HEADS, CHANNELS, QUERY_WIDTH = 8, 16, 16
MODEL = {"d_model": HEADS * CHANNELS, "num_layers": 4, "n_heads": HEADS}
VOCABULARY = "".join(chr(code) for code in range(0x100, 0x180))
OURS = "native"
# How many times as fast ours should be as each contender, and the tokens or the position of which that is said.
GOALS = {("operators", "scan"): (10.0, 4096), ("operators", "attention"): (3.0, 4096), ("decoding", "attention"): (5.0, 8192)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096], help="default: %(default)s")
    parser.add_argument("--past", type=int, nargs="+", default=[64, 1024, 8192], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender (default: %(default)s)")


def run(tokens: list[int], past: list[int], repeats: int) -> list[dict[str, Any]]:
    if repeats < 5:
        raise SystemExit(f"repeats ({repeats}) must be >= 5")
    results = []
    for num_tokens in tokens:
        for query_width in (0, QUERY_WIDTH):
            about = {"what": "operators", "state": "matrix" if query_width else "vector", "tokens": num_tokens}
            results += rows(operators(num_tokens, query_width), about, repeats)
    with tempfile.TemporaryDirectory() as folder:
        files = {mixer: export(mixer, Path(folder), max(past)) for mixer in ("resolvent", "attention")}
        for num_past in past:
            steps = {OURS if mixer == "resolvent" else mixer: step(path, num_past) for mixer, path in files.items()}
            results += rows(steps, {"what": "decoding", "state": "matrix", "tokens": num_past}, repeats)
    return results


def rows(runs: dict[str, Run], about: dict[str, Any], repeats: int) -> list[dict[str, Any]]:
    times = interleaved(runs, repeats, is_wall=False)
    made = []
    for way, seconds in times.items():
        low, high = statistics.quantiles(seconds, n=4)[::2]
        made.append(about | {"way": way, "seconds": statistics.median(seconds), "quartiles": [low, high]})
    return made


def operators(num_tokens: int, query_width: int) -> dict[str, Run]:
    inputs = mixing_inputs(num_tokens, query_width)
    model = mixing_model()
    runs: dict[str, Run] = {
        name: partial(session(model, 1, is_native).run, None, inputs) for name, is_native in ((OURS, True), ("scan", False))
    }
    ours, plain = (found() for found in runs.values())
    for one, other in zip(ours, plain, strict=True):
        assert np.abs(one - other).max() <= 1e-4 * np.abs(other).max()
    heads = np.random.default_rng(1).standard_normal((3, 1, num_tokens, HEADS * CHANNELS), dtype=np.float32)
    runs["attention"] = partial(session(attention_model(), 1, False).run, None, dict(zip("qkv", heads, strict=True)))
    return runs


def mixing_inputs(num_tokens: int, query_width: int) -> dict[str, np.ndarray]:
    """A hermitian operator; without queries its state is a vector."""
    rng = np.random.default_rng(0)
    sites, width = (1, HEADS, num_tokens), max(query_width, 1)
    hop, turn = rng.uniform(0.5, 1.5, sites), rng.uniform(-np.pi, np.pi, sites)
    queries = (1, 1, num_tokens if query_width else 1, width)
    values = {
        "alpha_re": rng.uniform(-1.5, 1.5, sites),
        "alpha_im": -rng.uniform(0.05, 0.5, sites),
        "w": hop**2,
        "c_re": hop * np.cos(turn),
        "c_im": hop * np.sin(turn),
        "u": rng.standard_normal((*sites, CHANNELS)),
        "q": rng.standard_normal(queries) if query_width else np.ones(queries),
        "k": rng.standard_normal(queries) if query_width else np.ones(queries),
        **{f"pivot_{part}": np.zeros((1, HEADS)) for part in ("re", "im")},
        **{f"carry_{part}": np.zeros((1, HEADS, width, CHANNELS)) for part in ("re", "im")},
    }
    return {name: value.astype(np.float32) for name, value in values.items()}


def mixing_model() -> onnx.ModelProto:
    pivots = ["G_re", "G_im"]
    read_by_sweep = [tensor.name.replace("first", "pivot") for tensor in RESOLVENT_SWEEP.inputs]
    read_by_mix = [tensor.name.replace("first", "carry") for tensor in RESOLVENT_MIX.inputs]
    outputs = [tensor.name for tensor in RESOLVENT_MIX.outputs]
    nodes = [
        helper.make_node(RESOLVENT_SWEEP.name, read_by_sweep, pivots, domain=DOMAIN),
        helper.make_node(RESOLVENT_MIX.name, read_by_mix, outputs, domain=DOMAIN),
    ]
    names = [name for name in (*read_by_sweep, *read_by_mix) if name not in pivots]
    model = _model(nodes, [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names], outputs)
    model.functions.extend(fallback_functions())
    return model


def attention_model() -> onnx.ModelProto:
    """onnxruntime's fused operator, which reads [B, T, D] and holds no matrix of T x T."""
    node = helper.make_node("MultiHeadAttention", list("qkv"), ["y"], domain="com.microsoft", num_heads=HEADS, unidirectional=1)
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("B", "T", HEADS * CHANNELS)) for name in "qkv"]
    return _model([node], inputs, ["y"])


def _model(nodes: list[onnx.NodeProto], inputs: list[onnx.ValueInfoProto], outputs: list[str]) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "mixing", inputs, [onnx.ValueInfoProto(name=name) for name in outputs])
    opsets = [("", 18), (DOMAIN, OPSET_VERSION), ("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=[helper.make_opsetid(*opset) for opset in opsets], ir_version=9)


def export(mixer: str, folder: Path, longest: int) -> Path:
    torch.manual_seed(0)
    hops = {"hopping": "hermitian"} if mixer == "resolvent" else {}
    config = LanguageModelConfig(**MODEL, context_length=longest + 2, mixer=mixer, mixer_args=hops, ffn=FFNConfig(num_tiles=16))
    path = folder / f"{mixer}.onnx"
    held_out = torch.randint(len(VOCABULARY), (128,))
    export_language_model(LanguageModel(len(VOCABULARY), config).eval(), VOCABULARY, held_out, path, fallback=False)
    return path


def step(path: Path, num_past: int) -> Run:
    """One token after num_past others; what a cache holds of them does not change its time."""
    options = session_options(intra_op_num_threads=1)
    options.log_severity_level = 4
    made = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    state = {
        name: rng.standard_normal([size or num_past for size in value.shape], dtype=np.float32)
        for name, value in empty_state(made, 1).items()
    }
    outputs = [output.name for output in made.get_outputs() if output.name != "tile_idx"]
    return partial(made.run, outputs, {"token": np.array([[3]]), **state})


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| | state | tokens, or tokens before | way | ms | its time / ours |",
        "|---|---|---|---|---|---|",
    ]
    ours = {(row["what"], row["state"], row["tokens"]): row["seconds"] for row in results if row["way"] == OURS}
    for row in results:
        ratio = row["seconds"] / ours[row["what"], row["state"], row["tokens"]]
        goal, tokens = GOALS.get((row["what"], row["way"]), (0.0, 0))
        aim = f" (goal {goal:.0f})" if row["tokens"] == tokens else ""
        sizes = f"{row['what']} | {row['state']} | {row['tokens']} | {row['way']}"
        lines.append(f"| {sizes} | {row['seconds'] * 1e3:.3f} | {ratio:.1f}{aim} |")
    return "\n".join(lines)
