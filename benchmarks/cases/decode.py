"""Generation with a whole model, one token at a time: tokens per second and resident memory.

A language model of random weights with ternary tiles and ternary attention is exported, and answers one token after --past
others that stand in its cache. Against the same model in float32: in onnxruntime, where each ternary operator is replaced by
standard ones that gather the float matrices of the chosen tile, and in torch, with its ternary weights computed once. All
compute the chosen tiles only, and all must give the same logits (8 bits: nearly).

The contenders take turns in one process; time is that of the calling thread with one thread, wall time with more; medians of
--repeats turns. Memory is that of a process which holds one contender alone.

A second table is about models that route on context, whose layers share one SignatureRoute in the file: against the same file
with a SignatureRoute for each layer, and with none, where constants stand for the choices. Activations of 8 bits, one thread;
what is saved is the median over --context-turns turns of the ratio within a turn.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import helper, numpy_helper
from rich.progress import track

from ort_ops.export import export_language_model
from ort_ops.file_format import Activations
from ort_ops.graph import set_activations
from ort_ops.library import session_options
from ort_ops.panels import from_panels
from ort_ops.schema import DOMAIN
from ort_ops.state import empty_state
from trix.nn import FFNConfig, LanguageModel, LanguageModelConfig
from trix.nn.ternary_weight import TernaryWeight

WAYS = ("trix 8 bit", "trix 24 bit", "ort float32", "torch float32")
VOCABULARY = "".join(chr(code) for code in range(0x100, 0x200))
FILES = {"trix 8 bit": "8.onnx", "trix 24 bit": "24.onnx", "ort float32": "float.onnx", "torch float32": "model.pt"}
CONTEXT_WAYS = ("a route per layer", "one route", "no route")
Step = Callable[[], Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--d-model", type=int, default=1024, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--tiles", type=int, default=16, help="in a layer (default: %(default)s)")
    parser.add_argument("--past", type=int, default=64, help="tokens in the cache (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=7, help="turns of each contender (default: %(default)s)")
    context = parser.add_argument_group("models that route on context")
    context.add_argument("--context-d-model", type=int, nargs="*", default=[128, 512], help="default: %(default)s")
    context.add_argument("--context-layers", type=int, default=4, help="default: %(default)s")
    context.add_argument("--context-tiles", type=int, default=64, help="in a layer (default: %(default)s)")
    context.add_argument("--context-turns", type=int, default=2000, help="turns of each contender (default: %(default)s)")


def run(
    d_model: int,
    layers: int,
    tiles: int,
    past: int,
    threads: list[int],
    repeats: int,
    context_d_model: list[int],
    context_layers: int,
    context_tiles: int,
    context_turns: int,
) -> list[dict[str, Any]]:
    for name, turns in {"repeats": repeats, "context-turns": context_turns}.items():
        if turns < 5:
            raise SystemExit(f"{name} ({turns}) must be >= 5")
    if context_layers < 2:
        raise SystemExit(f"context-layers ({context_layers}) must be >= 2, for layers to share a route")
    of_context = [row for d in context_d_model for row in context_rows(d, context_layers, context_tiles, past, context_turns)]
    return [*contenders(d_model, layers, tiles, past, threads, repeats), *of_context]


def contenders(d_model: int, layers: int, tiles: int, past: int, threads: list[int], repeats: int) -> list[dict[str, Any]]:
    config = model_config(d_model, layers, tiles, past)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(config, folder)
        memory = {way: resident_bytes(way, folder, config, past) for way in track(WAYS, "memory")}
        results = []
        for num_threads in threads:
            steps = {way: make_step(way, folder, config, past, num_threads) for way in WAYS}
            check(steps)
            times = interleaved(steps, repeats, is_wall=num_threads > 1)
            for way in WAYS:
                low, high = statistics.quantiles(times[way], n=4)[::2]
                seconds = statistics.median(times[way])
                row = {"way": way, "threads": num_threads, "seconds": seconds, "quartiles": [low, high]}
                results.append(row | {"resident_bytes": memory[way], "file_bytes": (folder / FILES[way]).stat().st_size})
    return results


def model_config(d_model: int, layers: int, tiles: int, past: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        d_model,
        layers,
        n_heads=max(d_model // 64, 1),
        context_length=past + 2,
        ternary_attention=True,
        ffn=FFNConfig(num_tiles=tiles),
    )


def make_files(config: LanguageModelConfig, folder: Path) -> None:
    model = LanguageModel(len(VOCABULARY), config).eval()
    torch.save(model.state_dict(), folder / FILES["torch float32"])
    held_out = torch.randint(len(VOCABULARY), (2 * config.context_length,))
    export_language_model(model, VOCABULARY, held_out, folder / FILES["trix 24 bit"], fallback=False)
    proto = onnx.load(folder / FILES["trix 24 bit"])
    onnx.save(in_float(with_route_per_layer(proto)), folder / FILES["ort float32"])
    set_activations(proto.graph, Activations(bits=8, group_size=0))
    onnx.save(proto, folder / FILES["trix 8 bit"])


def make_step(way: str, folder: Path, config: LanguageModelConfig, past: int, num_threads: int) -> Step:
    token = np.arange(past + 1, dtype=np.int64)[None] % len(VOCABULARY)
    if way == "torch float32":
        return torch_step(folder / FILES[way], config, torch.from_numpy(token), num_threads)
    options = session_options() if way.startswith("trix") else ort.SessionOptions()
    return session_step(str(folder / FILES[way]), options, token, num_threads)


def session_step(model: str | bytes, options: ort.SessionOptions, token: np.ndarray, num_threads: int) -> Step:
    """model: a path, or bytes, which the session keeps in memory. token int64 [1, P + 1]: the step reads the last one, with the
    others in its cache."""
    options.intra_op_num_threads, options.log_severity_level = num_threads, 4
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    past = token.shape[1] - 1
    state = empty_state(session, 1)
    outputs = [output.name for output in session.get_outputs() if output.name.startswith("present")]
    for place in range(past):  # the float graph takes one token at a time
        values = session.run(outputs, {"token": token[:, place : place + 1], **state})
        state = dict(zip(state, values, strict=True))
    return partial(session.run, ["logits", *outputs], {"token": token[:, past:], **state})


def torch_step(path: Path, config: LanguageModelConfig, token: torch.Tensor, num_threads: int) -> Step:
    torch.set_num_threads(num_threads)
    model = LanguageModel(len(VOCABULARY), config).eval()
    model.load_state_dict(torch.load(path, weights_only=True))
    for module in model.modules():
        if isinstance(module, TernaryWeight):  # its ternary form, once and for all
            module.ternary = partial(torch.Tensor.detach, module.ternary().detach().contiguous())  # type: ignore[method-assign]
    with torch.no_grad():
        _, before = model(token[:, :-1], state=model.empty_state(1))

    def step() -> list[np.ndarray]:
        with torch.no_grad():
            (logits, _, _), _ = model(token[:, -1:], state=before)
            return [logits.numpy()]

    return step


def in_float(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model for one token at a time, of standard operators with float32 matrices; one tile per token."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    added: dict[str, np.ndarray] = {}
    nodes = []
    for index, node in enumerate(proto.graph.node):
        if node.domain != DOMAIN:
            nodes.append(node)
            continue
        name = f"float_{index}"
        make = {"TernaryTileMatMul": _float_product, "SignatureRoute": _float_route, "TernaryFFN": _float_ffn}[node.op_type]
        made, own = make(node, constants, name)
        nodes += made
        added |= own
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    read = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in read]
    model.graph.initializer.extend([*kept, *(numpy_helper.from_array(array, name) for name, array in added.items())])
    return model


def _matrices(constants: dict[str, np.ndarray], packed: str, scale: str, num_columns: int) -> np.ndarray:
    """[E, K, N] float32, so that x [1, K] meets it from the left."""
    scale_EN = constants[scale]
    weight_ENK = from_panels(constants[packed], scale_EN.shape[1], num_columns) * scale_EN[..., None]
    return np.ascontiguousarray(weight_ENK.transpose(0, 2, 1), dtype=np.float32)


Made = tuple[list[onnx.NodeProto], dict[str, np.ndarray]]


def _float_product(node: onnx.NodeProto, constants: dict[str, np.ndarray], name: str) -> Made:
    x, packed, scale, _ = node.input
    num_columns = _width(constants[packed])
    weight = _matrices(constants, packed, scale, num_columns)[0]
    return [helper.make_node("MatMul", [x, f"{name}.weight"], list(node.output))], {f"{name}.weight": weight}


def _float_ffn(node: onnx.NodeProto, constants: dict[str, np.ndarray], name: str) -> Made:
    x, tile_idx, weight, up, up_scale, down, down_scale = node.input
    num_hidden, width = constants[up_scale].shape[1], constants[down_scale].shape[1]
    own = {
        f"{name}.up": _matrices(constants, up, up_scale, width),
        f"{name}.down": _matrices(constants, down, down_scale, num_hidden),
        f"{name}.one": np.array([-1], np.int64),
    }
    value = [f"{name}.{i}" for i in range(8)]
    nodes = [
        helper.make_node("Reshape", [tile_idx, f"{name}.one"], [value[0]]),
        helper.make_node("Gather", [f"{name}.up", value[0]], [value[1]]),
        helper.make_node("MatMul", [x, value[1]], [value[2]]),  # [1, D] x [1, D, H]
        helper.make_node("Relu", [value[2]], [value[3]]),
        helper.make_node("Mul", [value[3], value[3]], [value[4]]),
        helper.make_node("Gather", [f"{name}.down", value[0]], [value[5]]),
        helper.make_node("MatMul", [value[4], value[5]], [value[6]]),
        helper.make_node("Squeeze", [value[6], f"{name}.axis"], [value[7]]),
        helper.make_node("Mul", [value[7], weight], list(node.output)),
    ]
    return nodes, own | {f"{name}.axis": np.array([0], np.int64)}


def _float_route(node: onnx.NodeProto, constants: dict[str, np.ndarray], name: str) -> Made:
    x, signatures, bias, log_mass = node.input
    assert not constants[log_mass].any()
    codes = from_panels(constants[signatures], len(constants[bias]), _width(constants[signatures])).astype(np.float32)
    norm = np.sqrt(np.maximum(np.abs(codes).sum(-1, keepdims=True), 1))
    tile_idx, weight, _ = node.output
    nodes = [
        helper.make_node("MatMul", [x, f"{name}.table"], [f"{name}.score"]),
        helper.make_node("Add", [f"{name}.score", bias], [f"{name}.key"]),
        helper.make_node("ArgMax", [f"{name}.key"], [tile_idx], axis=1, keepdims=1),
        helper.make_node("Softmax", [f"{name}.score"], [f"{name}.share"]),
        helper.make_node("GatherElements", [f"{name}.share", tile_idx], [f"{name}.chosen"], axis=1),
        helper.make_node("Mul", [f"{name}.chosen", f"{name}.root"], [weight]),
    ]
    root = np.array(len(codes) ** 0.5, np.float32)
    return nodes, {f"{name}.table": np.ascontiguousarray((codes / norm).T), f"{name}.root": root}


def _width(panels: np.ndarray) -> int:
    return panels.shape[-2] * 16  # sizes are multiples of 16 here


def check(steps: dict[str, Step]) -> None:
    logits = {way: step()[0] for way, step in steps.items()}
    scale = np.abs(logits["ort float32"]).max()
    for way, found in logits.items():
        difference = float(np.abs(found - logits["ort float32"]).max() / scale)
        assert difference < (0.1 if way == "trix 8 bit" else 1e-4), (way, difference)


def interleaved(steps: dict[str, Step], repeats: int, is_wall: bool) -> dict[str, list[float]]:
    clock = time.perf_counter if is_wall else time.thread_time
    times: dict[str, list[float]] = {way: [] for way in steps}
    for _ in track(range(repeats), "turns"):
        for way, step in steps.items():
            step()
            start = clock()
            for _ in range(5):
                step()
            times[way].append((clock() - start) / 5)
    return times


def context_rows(d_model: int, layers: int, tiles: int, past: int, turns: int) -> list[dict[str, Any]]:
    """Seconds of each of CONTEXT_WAYS. saved: share of the time with a route per layer, median over turns."""
    ffn = FFNConfig(num_tiles=tiles, route_on="context", signatures="drawn")
    config = replace(model_config(d_model, layers, tiles, past), ffn=ffn)
    torch.manual_seed(0)
    model = LanguageModel(len(VOCABULARY), config).eval()
    held_out = torch.randint(len(VOCABULARY), (2 * config.context_length,))
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "context.onnx"
        export_language_model(model, VOCABULARY, held_out, path, fallback=False, activations=Activations(8, 0))
        proto = onnx.load(path)
    files = dict(zip(CONTEXT_WAYS, (with_route_per_layer(proto), proto, without_route(proto)), strict=True))
    token = np.arange(past + 1, dtype=np.int64)[None] % len(VOCABULARY)
    steps = {way: session_step(file.SerializeToString(), session_options(), token, 1) for way, file in files.items()}
    separate, joined = (steps[way]()[0] for way in CONTEXT_WAYS[:2])
    assert np.array_equal(separate, joined)
    times = interleaved(steps, turns, is_wall=False)
    rows = []
    for way in CONTEXT_WAYS:
        low, high = statistics.quantiles(times[way], n=4)[::2]
        saved = [1 - own / separate for own, separate in zip(times[way], times[CONTEXT_WAYS[0]], strict=True)]
        row = {"way": f"context, {way}", "threads": 1, "d_model": d_model, "layers": layers, "tiles": tiles}
        row |= {"seconds": statistics.median(times[way]), "quartiles": [low, high], "saved": statistics.median(saved)}
        rows.append(row)
    return rows


def with_route_per_layer(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model with a SignatureRoute for each layer in place of the one that they share, where they do."""
    model, route, joins, splits = _shared_route(proto)
    if not splits:  # a single layer
        return model
    constants = zip(*(join.input for join in joins), strict=True)
    choices = zip(*(split.output for split in splits), strict=True)
    own = []
    for inputs, outputs in zip(constants, choices, strict=True):
        node = helper.make_node(route.op_type, [route.input[0], *inputs], [*outputs, ""], domain=DOMAIN)
        node.attribute.extend(attribute for attribute in route.attribute if attribute.name != "num_groups")
        own.append(node)
    _replace(model, route, own, gone=[*joins, *splits])
    return model


def without_route(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same model for one token at a time, which goes to the first tile in each layer. The code is still computed."""
    model, route, joins, _ = _shared_route(proto)
    num_layers = len(joins[0].input)
    _replace(model, route, [], gone=joins)
    chosen = {route.output[0]: np.zeros((1, num_layers), np.int64), route.output[1]: np.ones((1, num_layers), np.float32)}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in chosen.items())
    model.graph.output.append(helper.make_tensor_value_info(route.input[0], onnx.TensorProto.FLOAT, None))
    return model


def _shared_route(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.NodeProto, list[onnx.NodeProto], list[onnx.NodeProto]]:
    """A copy of the model; in it the shared SignatureRoute, what joins its constants, and what separates its choices."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    nodes = model.graph.node
    (route,) = (node for node in nodes if node.op_type == "SignatureRoute")
    joins = [node for name in route.input[1:] for node in nodes if name in node.output]
    splits = [node for name in route.output[:2] for node in nodes if node.op_type == "Split" and node.input[0] == name]
    return model, route, joins, splits


def _replace(model: onnx.ModelProto, node: onnx.NodeProto, others: list[onnx.NodeProto], gone: list[onnx.NodeProto]) -> None:
    nodes = [other for old in model.graph.node if old not in gone for other in (others if old == node else [old])]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def resident_bytes(way: str, folder: Path, config: LanguageModelConfig, past: int) -> int:
    """What a process grows by that loads one contender and makes a step."""
    sizes = {"d_model": config.d_model, "layers": config.num_layers, "tiles": config.ffn.num_tiles, "past": past}
    command = [sys.executable, __file__, way, str(folder), json.dumps(sizes)]
    finished = subprocess.run(command, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr)
    return int(finished.stdout)


def _print_resident_bytes(way: str, folder: str, sizes: dict[str, int]) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    config = model_config(sizes["d_model"], sizes["layers"], sizes["tiles"], sizes["past"])
    before = resident()
    step = make_step(way, Path(folder), config, sizes["past"], 1)
    step()
    print(resident() - before)


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| model | threads | tokens a second | speed of trix 8 bit / its speed | resident MB | file MB |",
        "|---|---|---|---|---|---|",
    ]
    ours = {row["threads"]: row["seconds"] for row in results if row["way"] == "trix 8 bit"}
    for row in results:
        if "saved" in row:
            continue
        ratio = row["seconds"] / ours[row["threads"]]
        sizes = f"{row['resident_bytes'] / 1e6:.0f} | {row['file_bytes'] / 1e6:.0f}"
        lines.append(f"| {row['way']} | {row['threads']} | {1 / row['seconds']:.0f} | {ratio:.1f} | {sizes} |")
    of_context = [row for row in results if "saved" in row]
    if of_context:
        lines += ["", "| model | width | layers | tiles | us per token | saved |", "|---|---|---|---|---|---|"]
    for row in of_context:
        sizes = f"{row['d_model']} | {row['layers']} | {row['tiles']}"
        lines.append(f"| {row['way']} | {sizes} | {row['seconds'] * 1e6:.0f} | {row['saved']:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    _print_resident_bytes(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
