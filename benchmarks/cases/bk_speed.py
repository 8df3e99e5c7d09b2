"""Time and memory of resolvent mixing by the length of the sequence, next to causal attention.

vector, matrix    pivots and mixing of trix.functional, hermitian couplings; a vector or a 16 x 16 matrix as state of a head
one_way_vector, one_way_matrix    the same mixing without couplings back (G = 1 / alpha): no sweep
sweep             the pivots alone
attention         torch.nn.functional.scaled_dot_product_attention, causal: its flash kernel for CPUs
mambapy           the parallel scan of mambapy 1.2.0, where it is installed: selective_scan of mambapy.mamba.MambaBlock, 128
                  channels with a state of 16 each, as many numbers of state as matrix has (there complex)
decode            the whole ResolventMixer of width 128, without gradients: one token after "tokens" that it has read

All but decode: the mixing alone, without projections; forward, and backward to all inputs, batch 1, 8 heads of 16, float32. CPU
time of one thread. The contestants take turns; the first turn is not measured. Ratios are taken turn by turn. Peak memory is
what a process of its own grows by. Before any time is taken, chunks and loop are compared.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import interleaved, one_thread

from trix.functional.resolvent import Pair, resolvent_pivots
from trix.functional.resolvent_mix import resolvent_mix
from trix.nn import ResolventMixer
from trix.outputs import TokenContext

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS, WIDTH, ETA = 8, 16, 0.1
OURS = ("vector", "matrix", "one_way_vector", "one_way_matrix", "sweep")
WAYS = (*OURS, "attention", "mambapy")
DECODED = 50  # tokens in a turn, each after the other
DECODE_TURNS = 10  # for each of --repeats: turns are short, and the ratio sought is near 1
QUADRATIC_BYTES = 4 * HEADS  # of the scores of attention, per pair of tokens
BENCHMARKS = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192, 16384, 65536], help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="measured turns (default: %(default)s)")
    parser.add_argument("--max-attention", type=int, default=16384, help="longest for attention (default: %(default)s)")
    parser.add_argument("--decode-at", type=int, nargs="*", default=[64, 65536], help="tokens read (default: %(default)s)")
    parser.add_argument("--max-scan", type=int, default=8192, help="longest for mambapy (default: %(default)s)")


def run(lengths: list[int], repeats: int, max_attention: int, max_scan: int, decode_at: list[int]) -> list[Result]:
    check()
    longest = {"attention": max_attention, "mambapy": max_scan if find_spec("mambapy") else 0}
    results = []
    with one_thread():
        for length in lengths:
            ways = {way: make(way, length) for way in WAYS if length <= longest.get(way, length)}
            seconds = interleaved(ways, repeats + 1)
            ms = {way: [1e3 * second for second in of_way[1:]] for way, of_way in seconds.items()}
            results += [{"way": way, "length": length, "ms": ms[way], "peak_bytes": peak_bytes(way, length)} for way in ways]
        steps = interleaved({str(length): make_decode(length) for length in decode_at}, DECODE_TURNS * repeats + 1)
    for length in decode_at:
        ms_per_token = [1e3 * second / DECODED for second in steps[str(length)][1:]]
        results.append({"way": "decode", "length": length, "ms": ms_per_token, "peak_bytes": None})
    return results


def make(way: str, length: int) -> Callable[[], tuple[Tensor, ...]]:
    """A function that goes forward and backward, and returns the gradients."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    if way == "mambapy":
        return _made(*_mamba_scan(length, normal), normal)
    sites, vectors = (1, HEADS, length), (1, HEADS, length, WIDTH)
    if way == "attention":
        return _made(
            lambda *qkv: (F.scaled_dot_product_attention(*qkv, is_causal=True),), [normal(*vectors) for _ in range(3)], normal
        )
    inputs = [0.5 * normal(*sites), torch.full(sites, ETA), 0.7 * normal(*sites), 0.7 * normal(*sites), normal(*vectors)]
    if way == "sweep":
        return _made(lambda a, eta, c_re, c_im: pivots(way, a, eta, Pair(c_re, c_im)), inputs[:4], normal)
    if way.endswith("matrix"):
        inputs += [normal(1, 1, length, WIDTH) for _ in range(2)]
    return _made(lambda *inputs: mixed(way, *inputs), inputs, normal)


@torch.no_grad()
def make_decode(length: int) -> Callable[[], Tensor]:
    """A function that goes on DECODED tokens from the state after length tokens, one by one, and returns the last update."""
    torch.manual_seed(0)
    mixer = ResolventMixer(HEADS * WIDTH, HEADS, hopping="hermitian").eval()
    _, after, _ = mixer(torch.randn(1, length, HEADS * WIDTH), TokenContext(), mixer.empty_state(1))
    tokens = torch.randn(1, DECODED, HEADS * WIDTH).split(1, dim=1)

    @torch.no_grad()
    def decode() -> Tensor:
        state = after
        for x_BTD in tokens:
            update_BTD, state, _ = mixer(x_BTD, TokenContext(), state)
        return update_BTD

    return decode


def _made(
    forward: Callable[..., tuple[Tensor, ...]], inputs: list[Tensor], normal: Callable[..., Tensor]
) -> Callable[[], tuple[Tensor, ...]]:
    inputs = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        grads = [normal(*y.shape) for y in forward(*inputs)]
    return lambda: torch.autograd.grad(forward(*inputs), inputs, grads)


def pivots(way: str, a: Tensor, eta: Tensor, c: Pair, method: Any = "chunk") -> Pair:
    square = c.re.square() + c.im.square()
    if way.startswith("one_way"):  # without couplings back the state is bounded only by a broadening above |c|
        return resolvent_pivots(Pair(a, -(eta + square.sqrt())), None)
    return resolvent_pivots(Pair(a, -eta), square, method=method)


def mixed(way: str, a: Tensor, eta: Tensor, c_re: Tensor, c_im: Tensor, u: Tensor, *qk: Tensor, method: Any = "chunk") -> Pair:
    c = Pair(c_re, c_im)
    reading = {"q": qk[0], "k": qk[1]} if qk else {}
    return resolvent_mix(pivots(way, a, eta, c, method), c, u, **reading, method=method)[0]


def _mamba_scan(length: int, normal: Callable[..., Tensor]) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    from mambapy.mamba import MambaBlock

    channels = HEADS * WIDTH
    rate = -torch.arange(1.0, WIDTH + 1).expand(channels, -1)
    inputs = [normal(1, length, channels), F.softplus(normal(1, length, channels) - 3), rate.clone()]
    inputs += [normal(1, length, WIDTH), normal(1, length, WIDTH), normal(channels)]
    return lambda *inputs: (MambaBlock.selective_scan(None, *inputs),), inputs


def check() -> None:
    """The chunked methods give what the loops give."""
    generator = torch.Generator().manual_seed(0)
    a, c_re, c_im = 0.5 * torch.randn(3, 1, HEADS, 100, generator=generator)
    u, q, k = torch.randn(3, 1, HEADS, 100, WIDTH, generator=generator)
    for way in ("vector", "matrix", "one_way_vector", "one_way_matrix"):
        inputs = [a, torch.full_like(a, ETA), c_re, c_im, u, *([q, k] if way.endswith("matrix") else [])]
        for found, expected in zip(mixed(way, *inputs), mixed(way, *inputs, method="loop"), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=float(1e-4 * expected.abs().max()))


def peak_bytes(way: str, length: int) -> int:
    command = [sys.executable, "-m", "cases.bk_speed", json.dumps([way, length])]
    finished = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    if finished.returncode != 0:
        raise RuntimeError(finished.stderr)
    return int(finished.stdout)


def _print_peak_bytes(way: str, length: int) -> None:
    def kilobytes(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    torch.set_num_threads(1)
    make(way, 64)()  # what is loaded on first use is no part of it
    before = kilobytes("VmRSS")
    make(way, length)()
    print(1024 * (kilobytes("VmHWM") - before))


def find(results: list[Result], way: str, length: int) -> Result | None:
    return next((result for result in results if (result["way"], result["length"]) == (way, length)), None)


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def slope(results: list[Result], way: str, least: int = 2048) -> float | None:
    """The exponent of the time in the length, by least squares over the logarithms from the least length on."""
    points = [
        (math.log(result["length"]), math.log(statistics.median(result["ms"])))
        for result in results
        if result["way"] == way and result["length"] >= least
    ]
    return statistics.linear_regression(*zip(*points, strict=True)).slope if len(points) > 1 else None


def targets(results: list[Result]) -> list[str]:
    lines = []

    def compare(what: str, value: float, limit: float, is_least: bool) -> None:
        is_met = value >= limit if is_least else value <= limit
        lines.append(f"| {what} | {'>=' if is_least else '<='} {limit} | {value:.2f} | {'yes' if is_met else 'no'} |")

    def compare_times(what: str, above: str, below: str, length: int, limit: float, is_least: bool) -> None:
        pair = find(results, above, length), find(results, below, length)
        if pair[0] is not None and pair[1] is not None:
            compare(f"{what}, {length} tokens", ratio(pair[0]["ms"], pair[1]["ms"]), limit, is_least)

    for way, limits in (("vector", (4.0, 14.0, 28.0)), ("matrix", (3.0, 9.0, 15.0))):
        for length, limit in zip((2048, 8192, 16384), limits, strict=True):
            compare_times(f"attention / {way}", "attention", way, length, limit, True)
    compare_times("mambapy / matrix", "mambapy", "matrix", 8192, 15.0, True)
    compare_times("mambapy / vector", "mambapy", "vector", 8192, 15.0, True)
    for length in sorted({result["length"] for result in results}):
        for way in ("vector", "matrix"):
            compare_times(f"{way} / one_way_{way}", way, f"one_way_{way}", length, 1.3, False)
    for way in ("vector", "matrix"):
        if (exponent := slope(results, way)) is not None:
            compare(f"{way}: exponent of the time in the length", exponent, 1.05, False)
            *_, before, last = sorted({result["length"] for result in results if result["way"] == way})
            exponent = slope(results, way, before)
            compare(f"{way}: the same from {before} to {last} tokens alone", exponent, 1.05, False)
        if (result := find(results, way, 16384)) is not None:
            share = result["peak_bytes"] / (QUADRATIC_BYTES * 16384**2)
            compare(f"{way}: peak memory / one matrix of scores, 16384 tokens", share, 0.05, False)
    early, late = find(results, "decode", 64), find(results, "decode", 65536)
    if early is not None and late is not None:
        compare("decode after 65536 tokens / after 64", ratio(late["ms"], early["ms"]), 1.05, False)
    return lines


def table(results: list[Result]) -> str:
    rows = ["| tokens | way | ms, median (least to most) | attention / way | peak MB |", "|---" * 5 + "|"]
    for result in results:
        attention = find(results, "attention", result["length"]) if result["way"] in WAYS else None
        times = ratio(attention["ms"], result["ms"]) if attention else None
        spread = "{:.3g} ({:.3g} to {:.3g})".format(statistics.median(result["ms"]), min(result["ms"]), max(result["ms"]))
        start = f"| {result['length']} | {result['way']} | {spread} "
        peak = "" if result["peak_bytes"] is None else f"{result['peak_bytes'] / 1e6:.0f}"
        rows.append(f"{start}| {f'{times:.1f}' if times else ''} | {peak} |")
    return "\n".join([*rows, "", "| what | target | found | reached |", "|---" * 4 + "|", *targets(results)])


def figure(results: list[Result]) -> "Figure":
    """Time and peak memory by length, both on logarithmic scales."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(10, 4.2), layout="constrained")
    times, memory = drawn.subplots(1, 2)
    for way in WAYS:
        found = [result for result in results if result["way"] == way]
        lengths, style = [result["length"] for result in found], "--" if way.startswith("one_way") else "-"
        times.plot(lengths, [statistics.median(result["ms"]) for result in found], style, marker="o", label=way)
        memory.plot(lengths, [result["peak_bytes"] / 1e6 for result in found], style, marker="o")
    lengths = sorted({result["length"] for result in results if result["way"] in WAYS})
    for axes, label in ((times, "forward + backward, ms of CPU"), (memory, "peak memory, MB")):
        axes.set(xscale="log", yscale="log", xticks=lengths, xticklabels=lengths, xlabel="tokens", ylabel=label)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    drawn.legend(loc="outside right upper")
    return drawn


if __name__ == "__main__":
    _print_peak_bytes(*json.loads(sys.argv[1]))
