"""``trix generate``: continue a text with an exported language model or an imported one. Needs no torch."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.errors import UserError
from ort_ops.file_format import describe_size
from ort_ops.library import LibraryNotFoundError
from ort_ops.runtime import LanguageModelSession


def run_generate(arguments: list[str]) -> int:
    """Write the prompt and its continuation to stdout as it comes; then speed, size and parity to stderr."""
    options = make_parser().parse_strictly(arguments)
    if Path(options.model).is_dir():
        return _run_folder(options)
    try:
        session = _open(options.model, use_library=not options.no_library, num_threads=options.threads)
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    try:
        pieces = session.generate(
            options.prompt,
            num_tokens=options.num_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )
        _report(session, *_write(options.prompt, pieces))
    except ValueError as error:
        raise UserError(str(error)) from error
    return 0


def _run_folder(options: argparse.Namespace) -> int:
    """The same with a folder of `trix import`, by onnxruntime-genai."""
    from ort_ops.ternary_models.genai_folder import GenaiDecoder

    if options.no_library:
        raise UserError(
            "--no-library is for files of `trix export`; `trix import --no-native` writes a folder without the library"
        )
    try:
        decoder = GenaiDecoder(Path(options.model), options.threads)
        sampling = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
        found = _write(options.prompt, decoder.generate(options.prompt, options.num_tokens, **sampling))
    except ImportError as error:
        raise UserError("a folder of `trix import` needs onnxruntime-genai: pip install 'trix[genai]'") from error
    except (ValueError, OSError) as error:
        raise UserError(str(error)) from error
    print(f"\n{_speed(*found, 'onnxruntime-genai')}", file=sys.stderr)
    return 0


def _write(prompt: str, pieces: Iterator[str]) -> tuple[int, float]:
    """Write prompt and pieces as they come; returns the number of pieces, and the seconds that they took."""
    sys.stdout.write(prompt)
    num_generated, start = 0, time.perf_counter()
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
            num_generated += 1
    finally:  # an error has a line of its own
        seconds = time.perf_counter() - start
        sys.stdout.write("\n")
        sys.stdout.flush()
    return num_generated, seconds


def _speed(num_generated: int, seconds: float, by: str) -> str:
    speed = f"{num_generated / seconds:,.0f} tokens/s" if num_generated and seconds else "no tokens"
    return f"speed   {speed} ({num_generated} tokens, {by})"


def _open(path: str, use_library: bool, num_threads: int | None) -> LanguageModelSession:
    try:
        return LanguageModelSession(path, use_library=use_library, num_threads=num_threads)
    except LibraryNotFoundError:
        print("trix: the native operators are not installed: running the portable ones, slower", file=sys.stderr)
        return LanguageModelSession(path, use_library=False, num_threads=num_threads)


def _report(session: LanguageModelSession, num_generated: int, seconds: float) -> None:
    kernels = "native operators" if session.uses_library else "portable operators"
    lines = [
        _speed(num_generated, seconds, kernels),
        f"size    {describe_size(session.file_bytes, session.float32_bytes)}",
        f"parity  {session.check_parity()}",
    ]
    print("", *lines, sep="\n", file=sys.stderr)


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix generate",
        description="Continue a text with an exported language model, or an imported one.",
        epilog='examples:\n  trix generate runs/char_lm/model.onnx --prompt "The "\n'
        '  trix generate runs/char_lm/model.onnx --prompt "The " --num-tokens 500 --temperature 0.5 --seed 1\n'
        '  trix generate bitnet --prompt "The " --temperature 0',
    )
    parser.add_argument("model", help="a file written by `trix export`, or a folder written by `trix import`").complete = FILE
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument(
        "--num-tokens", type=int, default=200, help="how many tokens to add: characters, unless imported (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="0 always takes the likeliest, 1 draws (default: %(default)s)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from the smallest set of this probability (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same text (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=None, help="threads of onnxruntime (default: its own choice)")
    parser.add_argument("--no-library", action="store_true", help="run the portable operators, not the native ones")
    return parser
