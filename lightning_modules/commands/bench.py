"""``trix bench``: how fast an exported model runs here, or a case of the benchmarks of the source tree. Loads no torch."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.commands.output_text import print_rich
from lightning_modules.drawings import as_svg
from lightning_modules.errors import UserError
from lightning_modules.machine import cpu_name, instruction_sets, num_usable_cores
from ort_ops.file_format import CLASSIFIER, DECODER, LANGUAGE_MODEL, MODULE, ModelFileError, describe_size
from ort_ops.library import LibraryNotFoundError
from ort_ops.runtime import ExportedModel, check_logits
from ort_ops.state import StatefulReader
from trix.whole_file import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

RUNNER = Path(__file__).resolve().parents[2] / "benchmarks" / "run.py"
LENGTHS = (1, 8, 64, 256)
MIN_ROUNDS, DEFAULT_ROUNDS = 5, 7
MIN_SAMPLE_SECONDS = 0.02
MAX_BEFORE, MAX_GENERATED = 4096, 64


@dataclass(frozen=True)
class Case:
    """One sequence (batch 1): read whole, or from ``num_before`` on token by token, as text is generated."""

    inputs: NDArray[Any]
    num_before: int = 0

    @property
    def mode(self) -> str:
        return "generation" if self.num_before else "whole"

    @property
    def length(self) -> int:
        return int(self.inputs.shape[1]) - self.num_before


@dataclass(frozen=True)
class Timing:
    """Runs of ``length`` tokens, ``mode`` as :class:`Case`: the median over the rounds, the fastest and the slowest."""

    mode: str
    kernels: str
    threads: int
    length: int
    median_ms: float
    min_ms: float
    max_ms: float
    tokens_per_s: float
    ms_per_token: float


def run_bench(arguments: list[str]) -> int:
    """Measure a model, run a case, or list the cases."""
    if arguments and (arguments[0].startswith("-") or is_model(arguments[0])):
        return _bench_model(arguments)
    return _run_case(arguments)


def is_model(subject: str) -> bool:
    return subject.lower().endswith(".onnx") or Path(subject).is_file()


def case_names() -> list[str]:
    """Those of the source tree; none where there is none."""
    return sorted(path.stem for path in (RUNNER.parent / "cases").glob("[a-z]*.py"))


def _run_case(arguments: Sequence[str]) -> int:
    names = case_names()
    if not names:
        raise UserError(
            "the cases of benchmarks/ come with the source tree, not with the installed package; "
            "a model of your own is measured by `trix bench MODEL.onnx`"
        )
    if not arguments:
        print("cases (trix bench CASE --help lists the options of one)", *(f"  {name}" for name in names), sep="\n")
        print("a model of your own: trix bench MODEL.onnx")
        return 0
    if arguments[0] not in names:
        raise UserError(f"case ({arguments[0]}) must be a file that ends with .onnx, or one of {', '.join(names)}")
    return subprocess.run([sys.executable, str(RUNNER), *arguments], check=False).returncode


def _bench_model(arguments: list[str]) -> int:
    options = make_parser().parse_strictly(arguments)
    model = Path(options.model)
    output = model.with_suffix(".bench.json") if options.output is None else Path(options.output)
    if output.suffix != ".json":
        raise UserError(f"--output ({output}) must end with .json")
    drawing = output.with_suffix(".svg")
    for path in (output, drawing):
        check_output_file(path, model)
    if options.rounds < MIN_ROUNDS:
        raise UserError(f"--rounds ({options.rounds}) must be >= {MIN_ROUNDS}")
    if min(options.lengths) < 1:
        raise UserError(f"--lengths ({min(options.lengths)}) must be >= 1")
    try:
        sessions = open_sessions(model, options.threads)
        some = next(iter(sessions.values()))
        timings = measure(sessions, cases_of(some, options.lengths), options.rounds)
    except ValueError as error:
        text = str(error)
        raise UserError(text if str(model) in text else f"{model}: {text}") from error
    size = describe_size(some.file_bytes, some.float32_bytes)
    record = {"model": str(model), "size": size, "rounds": options.rounds, "machine": machine()}
    record["results"] = [asdict(timing) for timing in timings]
    print_rich(lambda console: _print(console, f"{model}: {size}", timings))
    try:
        with output_folder(output.parent):
            write_whole((json.dumps(record, indent=1) + "\n").encode(), output)
            write_whole(as_svg(figure(timings, model.name)), drawing)
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    print(f"wrote   {output} and {drawing}")
    return 0


def open_sessions(model: Path, threads: Sequence[int] | None) -> dict[tuple[str, int], ExportedModel]:
    """By kernels ("native", "portable") and threads; without what this machine or the file lacks, which is told.

    Raises:
        ModelFileError: neither path can run the file.
    """
    sessions: dict[tuple[str, int], ExportedModel] = {}
    errors: dict[str, Exception] = {}
    for num_threads in sorted({1, num_usable_cores()} if threads is None else set(threads)):
        for kernels in ("native", "portable"):
            try:
                sessions[kernels, num_threads] = ExportedModel(model, kernels == "native", num_threads)
            except (LibraryNotFoundError, ModelFileError) as error:
                errors[kernels] = error
    if not sessions:
        raise ModelFileError(str(errors["portable"]))
    for kernels, reason in errors.items():
        print(f"trix: the {kernels} operators are left out: {reason}", file=sys.stderr)
    return sessions


def cases_of(model: ExportedModel, lengths: Sequence[int]) -> list[Case]:
    """The example of the file at each length, up to what the model looks back on; features as they are. Of a language model
    also the second half of its context, or MAX_GENERATED tokens of it, token by token; after MAX_BEFORE tokens where half of
    the context is more.
    """
    if model.record.task in (MODULE, DECODER):
        raise ModelFileError(
            f"{model.path}: task ({model.record.task}) must be {LANGUAGE_MODEL} or {CLASSIFIER}: others have no texts to run on"
        )
    reference = model.metadata.get("reference")
    if not isinstance(reference, dict) or not isinstance(reference.get("input"), list):
        raise ModelFileError(f"{model.path}: metadata reference must hold an input")
    limit = model.metadata.get("context_length")
    try:
        example = np.asarray(reference["input"], dtype=np.int64 if type(limit) is int else np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise ModelFileError(f"{model.path}: the input of metadata reference must be numbers: {error}") from error
    if type(limit) is not int:
        return [Case(example)]
    token_T = example.ravel()
    whole = [Case(np.resize(token_T, (1, length))) for length in sorted({min(length, limit) for length in lengths})]
    if model.metadata.get("task") != "language_model":
        return whole
    half = min(limit // 2, MAX_BEFORE)
    return [*whole, Case(np.resize(token_T, (1, min(limit, half + MAX_GENERATED))), half)]


def measure(sessions: Mapping[tuple[str, int], ExportedModel], inputs: Sequence[Case], num_rounds: int) -> list[Timing]:
    """All take turns, round by round, in an order that moves on, so that a change of the machine's speed meets all alike."""
    cases = [(kernels, threads, place) for kernels, threads in sessions for place in range(len(inputs))]
    repeats: dict[tuple[str, int, int], int] = {}
    seconds: dict[tuple[str, int, int], list[float]] = {case: [] for case in cases}
    for kernels, threads, place in cases:
        model = sessions[kernels, threads]
        check_logits(model.path, model.run(inputs[place].inputs)[0])
        _seconds(model, inputs[place], 1)  # onnxruntime takes its memory in the first run
        repeats[kernels, threads, place] = max(1, round(MIN_SAMPLE_SECONDS / _seconds(model, inputs[place], 1)))
    for turn in range(num_rounds):
        start = turn % len(cases)
        for case in cases[start:] + cases[:start]:
            seconds[case].append(_seconds(sessions[case[:2]], inputs[case[2]], repeats[case]))
    return [_timing(inputs[case[2]], *case[:2], seconds[case]) for case in cases]


def _seconds(model: ExportedModel, case: Case, repeats: int) -> float:
    seconds = 0.0
    for _ in range(repeats):
        reader = _reader(model, case) if case.num_before else None
        start = time.perf_counter()
        if reader is None:
            model.run(case.inputs)
        else:
            for place in range(case.num_before, case.inputs.shape[1]):
                reader.read(case.inputs[:, place : place + 1], ["logits"])
        seconds += time.perf_counter() - start
    return seconds / repeats


def _reader(model: ExportedModel, case: Case) -> StatefulReader:
    reader = StatefulReader(model.session)
    reader.read(case.inputs[:, : case.num_before], ["logits"])
    return reader


def _timing(case: Case, kernels: str, threads: int, seconds: Sequence[float]) -> Timing:
    median, length = statistics.median(seconds), case.length
    ms = (median * 1e3, min(seconds) * 1e3, max(seconds) * 1e3)
    return Timing(case.mode, kernels, threads, length, *ms, tokens_per_s=length / median, ms_per_token=median * 1e3 / length)


def machine() -> dict[str, Any]:
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "instruction_sets": instruction_sets(),
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
    }


def _print(console: "Console", title: str, timings: Sequence[Timing]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    columns = ("operators", "threads", "tokens", "ms a run", "fastest", "slowest", "tokens/s", "ms a token")
    for name in columns:
        table.add_column(name, justify="left" if name == "operators" else "right", no_wrap=True)
    for timing in timings:
        ms = (f"{value:.3f}" for value in (timing.median_ms, timing.min_ms, timing.max_ms))
        table.add_row(
            timing.kernels,
            f"{timing.threads}",
            f"{timing.length}" if timing.mode == "whole" else f"{timing.length} one by one",
            *ms,
            f"{timing.tokens_per_s:,.0f}",
            f"{timing.ms_per_token:.4f}",
        )
    console.print(Text(title), soft_wrap=True)
    console.print(table)
    note = "One sequence at a time; one by one: as in generation, after half the context."
    console.print(Text(f"{note} Medians over rounds in which all take turns."), soft_wrap=True)


def figure(timings: Sequence[Timing], title: str) -> "Figure":
    """Milliseconds a run against its tokens, sequences as a whole, with the range over the rounds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    drawn = Figure(figsize=(6, 4), layout="constrained")
    axes = drawn.subplots()
    for kernels, threads in dict.fromkeys((timing.kernels, timing.threads) for timing in timings):
        key = ("whole", kernels, threads)
        own = [timing for timing in timings if (timing.mode, timing.kernels, timing.threads) == key]
        below = [timing.median_ms - timing.min_ms for timing in own]
        above = [timing.max_ms - timing.median_ms for timing in own]
        label = f"{kernels}, {threads} thread{'s' if threads > 1 else ''}"
        lengths, medians = [timing.length for timing in own], [timing.median_ms for timing in own]
        axes.errorbar(lengths, medians, yerr=[below, above], marker="o", capsize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set(xlabel="tokens in the sequence", ylabel="ms a run, median and range", title=title.replace("$", r"\$"))
    axes.grid(alpha=0.3)
    axes.legend()
    return drawn


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix bench",
        usage="trix bench MODEL.onnx [--lengths N ...] [--threads N ...] [--rounds N] [--output FILE.json]\n"
        "       trix bench [CASE [OPTIONS]]",
        description="Measure how fast an exported model runs here, with native and portable operators: a table, a plot, JSON.\n"
        "In the source tree also: run a case of benchmarks/ (without a name: list them).",
        epilog="examples:\n"
        "  trix bench runs/char_lm/model.onnx\n"
        "  trix bench runs/char_lm/model.onnx --lengths 1 128 --threads 1 --output speed.json\n"
        "  trix bench\n"
        "  trix bench kernels --repeats 5",
    )
    parser.add_argument("model", metavar="MODEL", help="a file written by `trix export`, or the name of a case").complete = FILE
    parser.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=LENGTHS,
        metavar="N",
        help=f"tokens of the sequences, at most what the model looks back on (default: {' '.join(map(str, LENGTHS))})",
    )
    parser.add_argument(
        "--threads", type=int, nargs="+", metavar="N", help="threads of onnxruntime (default: 1, and all cores)"
    )
    parser.add_argument(
        "--rounds", type=int, default=DEFAULT_ROUNDS, help=f"how often all take turns, >= {MIN_ROUNDS} (default: %(default)s)"
    )
    parser.add_argument(
        "--output", help="the JSON file to write, with the plot next to it (default: MODEL.bench.json, next to the model)"
    ).complete = FILE
    return parser
