"""``trix import``: a ternary language model that others have trained, as a folder for onnxruntime-genai. Needs no torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_modules.commands.arguments import FILE, CommandParser
from lightning_modules.commands.output_file import check_new_folder
from lightning_modules.errors import UserError
from lightning_modules.machine import git_state
from ort_ops.library import LibraryNotFoundError
from ort_ops.ternary_models.types import HEADS

SOURCE_TREE = Path(__file__).parents[2]


def run_import(arguments: list[str]) -> int:
    """Read the checkpoint, write the folder, and print what was written and how exact its products are."""
    options = make_parser().parse_strictly(arguments)
    checkpoint, output = Path(options.checkpoint), Path(options.output)
    check_new_folder(output)
    from ort_ops.ternary_models.decoder_folder import write_decoder
    from ort_ops.ternary_models.reading import open_checkpoint

    git = git_state(SOURCE_TREE) if (SOURCE_TREE / ".git").exists() else None
    try:
        with _progress() as on_step:
            report = write_decoder(
                open_checkpoint(checkpoint), output, head=options.head, native=not options.no_native, git=git, on_step=on_step
            )
    except LibraryNotFoundError as error:
        hint = "`trix import --no-native` writes a folder that needs none, `trix doctor` says what is missing"
        raise UserError(f"the native operators must be installed: {hint}") from error
    except OSError as error:
        raise UserError(f"{error.filename or output}: {error.strerror or error}") from error
    except (ValueError, ImportError) as error:
        raise UserError(str(error)) from error
    print(f"wrote   {output}")
    print(report)
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    from trix.superposition.progress import progress_bar

    with progress_bar() as progress:
        task = progress.add_task("importing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix import",
        description="Write a ternary language model, as a folder of Hugging Face or a GGUF file holds it, as a folder that\n"
        "onnxruntime-genai runs: the model in ONNX with its weights, the configuration of onnxruntime-genai, the native\n"
        "library, and the files of the tokenizer. It is compared with the arithmetic of BitLinear first. A\n"
        "checkpoint that is incomplete or not ternary is refused, and nothing is written.",
        epilog="examples:\n"
        "  trix import bitnet-b1.58-2B-4T --output bitnet\n"
        "  trix import Falcon3-3B-Instruct-1.58bit --output falcon --head float16\n"
        "  trix import llama3-tq2_0.gguf --output llama\n"
        '  trix generate bitnet --prompt "The "\n'
        "\n"
        "in Python (pip install onnxruntime-genai):\n"
        "  import onnxruntime_genai as og\n"
        "  model = og.Model('bitnet')\n"
        "  generator = og.Generator(model, og.GeneratorParams(model))\n"
        "  generator.append_tokens(og.Tokenizer(model).encode('The '))\n"
        "  generator.generate_next_token()  # as long as not generator.is_done()\n"
        "  print(og.Tokenizer(model).decode(generator.get_sequence(0)))",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="a folder with config.json and safetensors, or a GGUF file",
    ).complete = FILE
    parser.add_argument(
        "--output", required=True, metavar="DIR", help="the folder to write; it must not exist yet, or be empty"
    )
    parser.add_argument(
        "--head",
        choices=HEADS,
        default="int8",
        help="how embedding and head are kept: int8 (a scale for each 32 columns, activations in int8, too), float16 (float32 "
        "in memory) or float32 (default: %(default)s)",
    )
    parser.add_argument(
        "--no-native",
        action="store_true",
        help="write onnxruntime's own 2-bit products, to compare with: they need no native library, but use one scale "
        "per 128 activations instead of the one per token used in training",
    )
    return parser
