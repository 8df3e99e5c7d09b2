"""A ternary decoder of the shape of BitNet b1.58 2B4T: whole layers of ours against ggml's and against onnxruntime's 2 bit.

A decoder of --layers layers with random weights: norms, projections, rotation, attention over a cache that is written in
place, residuals. Embedding and head have 32 rows only, so nearly all of the time is that of the layers. Each contender answers
to the same tokens after the same past, and all must give nearly the same logits: they quantise activations in other groups.

- trix: the folder that `write_decoder` makes, once for each instruction set that this CPU has.
- ggml TQ2_0 and TQ1_0: the operators of llama.cpp's graph with its flash attention and its cache in float16, compiled with
  -march=native, and once more for AVX2 alone.
- ort 2 bit: the same folder with MatMulNBits, without and with onnxruntime's option for products by tables (LUT). onnxruntime
  takes the instruction set that it likes: it cannot be held back to AVX2.
- bitnet.cpp I2_S: not run, its sources are not in the package.

Then a model of --whole-layers layers with the vocabulary of 128256, one token: our embedding and head in int8, those of ggml in
Q8_0.

All contenders take turns in one process. Time is that of the calling thread on the CPU with one thread, wall time with more;
both are recorded, medians of --repeats turns with quartiles. A ratio is the median over turns of our time / theirs: below 1
ours is faster. The same call measures the limits (benchmarks/native/limits.cpp; needs a C++ compiler).
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnxruntime as ort
from bitnet_shape import LUT, RandomCheckpoint, SessionDecoder, library_of, shape
from case_options import check_distinct, whole
from cpu_limits import limits
from ggml_contestant import GgmlDecoder, build
from numpy.typing import NDArray
from rich.progress import track

from lightning_modules.machine import instruction_sets
from ort_ops.ternary_models.decoder_folder import write_decoder
from ort_ops.ternary_models.types import Head

SMALL_VOCABULARY, VOCABULARY = 32, 128256
# Our time / theirs at most, one thread, by contender and number of tokens.
GOALS = {("ggml TQ2_0", 1): 0.90, ("ort 2 bit", 1): 0.70, ("ort 2 bit, LUT", 1): 1.0, ("ggml TQ2_0", 16): 0.70}
MAX_ERROR = 0.1  # root mean square of the difference of logits, relative: other groups of activations
STEPS_PER_TURN = {1: 5}  # else 1


class Contender(Protocol):
    def prepare(self, token_T: NDArray[np.int64], num_past: int) -> None: ...
    def run(self) -> None: ...
    def logits(self) -> NDArray[np.float32]: ...


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--layers", type=whole(1), default=6, help="default: %(default)s")
    parser.add_argument("--whole-layers", type=whole(0), default=12, help="of the whole model; 0: none (default: %(default)s)")
    parser.add_argument("--past", type=whole(0), nargs="+", default=[64, 1024], help="default: %(default)s")
    parser.add_argument("--tokens", type=whole(1), nargs="+", default=[1, 16, 128], help="default: %(default)s")
    parser.add_argument("--threads", type=whole(1), nargs="+", default=[1, 2], help="default: %(default)s")
    parser.add_argument("--repeats", type=whole(5), default=7, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--shrink", type=whole(1, 5), default=1, help="divide all widths, to try it (default: %(default)s)")
    parser.add_argument("--no-ggml", action="store_true", help="leave out ggml, which is downloaded and compiled")


def run(
    layers: int,
    whole_layers: int,
    past: list[int],
    tokens: list[int],
    threads: list[int],
    repeats: int,
    shrink: int,
    no_ggml: bool,
) -> dict[str, Any]:
    check_distinct(past=past, tokens=tokens, threads=threads)
    libraries = {} if no_ggml else {name: build(name) for name in track(("native", "avx2"), "ggml")}
    measured = limits()
    small = RandomCheckpoint(shape(layers, SMALL_VOCABULARY, max(past) + max(tokens), shrink))
    rows = measure(small, "float32", past, tokens, threads, repeats, libraries)
    if whole_layers:
        large = RandomCheckpoint(shape(whole_layers, VOCABULARY // shrink, past[0] + 1, shrink))
        rows += measure(large, "int8", past[:1], [1], threads, repeats, libraries)
    return {"limits": measured, "load": os.getloadavg(), "layer_weights": layer_weights(small), "rows": rows}


def layer_weights(checkpoint: RandomCheckpoint) -> int:
    """Ternary weights of a layer: multiply-adds for each token."""
    config = checkpoint.config
    q_width, kv_width = config.num_heads * config.head_size, config.num_key_value_heads * config.head_size
    return config.hidden_size * (2 * q_width + 2 * kv_width + 3 * config.intermediate_size)


def measure(
    checkpoint: RandomCheckpoint,
    head: Head,
    past: list[int],
    tokens: list[int],
    threads: list[int],
    repeats: int,
    libraries: dict[str, Path],
) -> list[dict[str, Any]]:
    """A row for each number of threads, past length, number of tokens and contender."""
    rows = []
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_decoder(checkpoint, folder / "trix", head=head)
        write_decoder(checkpoint, folder / "ort", head=head, native=False)
        for num_threads in threads:
            found = contenders(checkpoint, head, folder, num_threads, libraries)
            for num_past, num_tokens in track([(P, T) for P in past for T in tokens], f"{num_threads} threads, {head} head"):
                token_T = random.integers(0, checkpoint.config.vocab_size, num_tokens)
                for contender in found.values():
                    contender.prepare(token_T, num_past)
                check(found)
                times = interleaved(found, repeats, STEPS_PER_TURN.get(num_tokens, 1))
                check(found)  # many runs later, too
                case = {"layers": checkpoint.config.num_layers, "head": head if head == "int8" else None}
                case |= {"threads": num_threads, "past": num_past, "tokens": num_tokens}
                rows += summarise(case, times)
    return rows


def contenders(
    checkpoint: RandomCheckpoint, head: Head, folder: Path, num_threads: int, libraries: dict[str, Path]
) -> dict[str, Contender]:
    found: dict[str, Contender] = {}
    for isa in own_instruction_sets():
        with library_of(isa, folder) as library:
            options = ort.SessionOptions()
            options.register_custom_ops_library(str(library))
        found[f"trix, {isa}"] = SessionDecoder(folder / "trix", checkpoint, options, num_threads)
    for way, uses_tables in (("ort 2 bit", "0"), ("ort 2 bit, LUT", "1")):
        options = ort.SessionOptions()
        options.add_session_config_entry(LUT, uses_tables)
        found[way] = SessionDecoder(folder / "ort", checkpoint, options, num_threads)
    ggml_head = "Q8_0" if head == "int8" else "F32"
    for build_name, library in libraries.items():
        for ternary in ("TQ2_0", "TQ1_0") if build_name == "native" and head == "float32" else ("TQ2_0",):
            decoder = GgmlDecoder(library, checkpoint, ternary, ggml_head, num_threads)
            for layer in range(checkpoint.config.num_layers):
                decoder.set_past(layer, checkpoint.past(layer, "key"), checkpoint.past(layer, "value"))
            found[f"ggml {ternary}, {build_name}"] = decoder
    return found


def own_instruction_sets() -> list[str]:
    """Those of this CPU that the layers' kernels are written for, best first."""
    named = {"avx512_vnni": {"avx512f", "avx512bw", "avx512vl", "avx512_vnni"}, "avx2": {"avx2", "fma"}}
    has = set(instruction_sets())
    return [name for name, needed in named.items() if needed <= has] or ["scalar"]


def check(found: dict[str, Contender]) -> None:
    """Raises AssertionError where the contenders are not one decoder."""
    logits = {}
    for way, contender in found.items():
        contender.run()
        logits[way] = contender.logits()
    first = next(iter(logits.values()))
    for way, other in logits.items():
        error = np.sqrt(np.mean((other - first) ** 2) / np.mean(first**2))
        assert error <= (0.0 if way.startswith("trix") else MAX_ERROR), (way, error)


Times = dict[str, list[tuple[float, float]]]


def interleaved(found: dict[str, Contender], repeats: int, num_steps: int) -> Times:
    """Of each turn the seconds of a step: of this thread on the CPU, and on the wall."""
    times: Times = {way: [] for way in found}
    for _ in range(repeats):
        for way, contender in found.items():
            contender.run()  # and the threads of the contender before have stopped to wait for work
            cpu, wall = time.thread_time(), time.perf_counter()
            for _ in range(num_steps):
                contender.run()
            times[way].append(((time.thread_time() - cpu) / num_steps, (time.perf_counter() - wall) / num_steps))
    return times


def summarise(case: dict[str, Any], times: Times) -> list[dict[str, Any]]:
    rows = []
    clock = 0 if case["threads"] == 1 else 1
    for way, of_way in times.items():
        cpu, wall = zip(*of_way, strict=True)
        row = case | {"contender": way, "cpu_s": statistics.median(cpu), "wall_s": statistics.median(wall)}
        row["quartiles_s"] = statistics.quantiles((cpu, wall)[clock], n=4)[::2]
        row["ours_to_this"] = {}
        for own in (own for own in times if own.startswith("trix")):
            ratios = [ours[clock] / theirs[clock] for ours, theirs in zip(times[own], of_way, strict=True)]
            row["ours_to_this"][own] = {
                "median": statistics.median(ratios),
                "quartiles": statistics.quantiles(ratios, n=4)[::2],
            }
        rows.append(row)
    return rows


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    own = list(rows[0]["ours_to_this"])
    heads = "".join(f" {way} / this |" for way in own)
    lines = [f"| layers | threads | past | tokens | contender | ms a layer |{heads} memory limit | products limit |"]
    lines.append("|---|---|---|---|---|---|" + "---|" * len(own) + "---|---|")
    for row in rows:
        seconds = row["cpu_s" if row["threads"] == 1 else "wall_s"]
        of_layer = f"{seconds / row['layers'] * 1e3:.3f}" if row["head"] is None else f"{seconds * 1e3:.1f} in all, with head"
        ratios = "".join(f" {row['ours_to_this'][way]['median']:.2f}{_goal(row, way)} |" for way in own)
        shares = " | ".join("" if share is None else f"{share:.0%}" for share in shares_of_limits(results, row))
        case = f"{row['layers']} | {row['threads']} | {row['past']} | {row['tokens']}"
        lines.append(f"| {case} | {row['contender']} | {of_layer} |{ratios} {shares} |")
    lines.append("\nbitnet.cpp I2_S: not run, its sources are not in the package")
    return "\n".join(lines)


def _goal(row: dict[str, Any], own: str) -> str:
    """The goal, where ours is held against the same instruction set: ggml's, or whatever onnxruntime takes."""
    way, _, compiled = row["contender"].rpartition(", ") if row["contender"].startswith("ggml") else (row["contender"], "", "")
    is_of_avx2 = own == "trix, avx2"
    goal = GOALS.get((way, row["tokens"])) if row["threads"] == 1 and row["head"] is None else None
    return f" (goal {goal:g})" if goal is not None and (not compiled or (compiled == "avx2") == is_of_avx2) else ""


def shares_of_limits(results: dict[str, Any], row: dict[str, Any]) -> tuple[float | None, float | None]:
    """Ours with one thread, without a head: of the memory that the thread can read, and of the products that it can do."""
    measured = results["limits"]
    if measured is None or row["threads"] > 1 or row["head"] is not None or not row["contender"].startswith("trix"):
        return None, None
    seconds = row["cpu_s"] / row["layers"]
    products = measured["avx2_products_per_s" if row["contender"] == "trix, avx2" else "int8_products_per_s"]
    of_memory = results["layer_weights"] / 4 / seconds / measured["bytes_read_per_s"]
    return of_memory, results["layer_weights"] * row["tokens"] / seconds / products if products else None
