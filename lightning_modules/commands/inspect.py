"""``trix inspect``: one HTML page about a checkpoint or an exported model, layer by layer and tile by tile."""

import functools
from argparse import Namespace
from collections.abc import Callable, Collection
from pathlib import Path

from lightning_modules.checkpoint_data import load_task, run_data
from lightning_modules.checkpoint_page import make_page
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import write_whole

DEFAULT_TOKENS = 4096


def run_inspect(arguments: list[str]) -> int:
    """Write the page, and print where it is."""
    options = make_parser().parse_strictly(arguments)
    model = best_checkpoint(Path(options.model))
    output = model.parent / f"{model.stem}.html" if options.output is None else Path(options.output)
    check_output_file(output, model)
    if options.num_tokens is not None and options.num_tokens < 1:
        raise UserError(f"--num-tokens ({options.num_tokens}) must be >= 1")
    for name in ("dump", "autoencoder"):
        if getattr(options, name) is not None and options.sae is None:
            raise UserError(f"--{name} ({getattr(options, name)}) must come with --sae RUN")
    trusted = trusted_modules(options.trust)
    with working_folder_searched(trusted):
        _write_page(_page_maker(model, options, trusted), model, output)
    print(f"wrote   {output}  (open it in a browser)")
    return 0


def _write_page(page: Callable[[], str], model: Path, output: Path) -> None:
    try:
        with output_folder(output.parent):
            write_whole(page().encode(), output.resolve())  # a link stays, the file that it names is replaced
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{model}: {error}") from error
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error


def _page_maker(model: Path, options: Namespace, trusted: Collection[str]) -> Callable[[], str]:
    """What makes the page; a checkpoint is read at once."""
    if model.suffix.lower() == ".onnx":
        from lightning_modules.commands.inspect_onnx import make_onnx_page

        if options.num_tokens is not None:
            raise UserError("--num-tokens belongs to a checkpoint: an exported model has no data but its own example")
        if options.sae is not None:
            raise UserError("--sae belongs to a checkpoint: an exported model has no activations to read")
        return functools.partial(make_onnx_page, model)
    task, checkpoint = load_task(str(model), "inspect", trusted)
    data = run_data(task, checkpoint, model, trusted)
    remarks = None
    if options.sae is not None:
        from lightning_modules.commands.inspect_latents import latent_remarks

        remarks = latent_remarks(task, model, options.sae, trusted, options.dump, options.autoencoder)
    return functools.partial(make_page, task, data, checkpoint, str(model), options.num_tokens or DEFAULT_TOKENS, remarks)


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix inspect",
        description="Write one HTML page about a checkpoint: what each tile responds to, its usage, what lands on it.\n"
        "Of an exported model (no torch needed): what it is, how it agrees with torch, its signatures and their history.",
        epilog="examples:\n"
        "  trix inspect runs/char_lm\n"
        "  trix inspect runs/char_lm/version_0/checkpoints/last.ckpt --output report.html\n"
        "  trix inspect runs/char_lm --sae runs/sae\n"
        "  trix inspect runs/char_lm/model.onnx",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{CHECKPOINT_HELP}, or a file written by `trix export`").complete = FILE
    parser.add_argument(
        "--output", help="the HTML file to write (default: next to the checkpoint or model, with the ending .html)"
    ).complete = FILE
    parser.add_argument(
        "--num-tokens",
        type=int,
        help="largest number of tokens of the validation data to measure a checkpoint on, in whole sequences "
        f"(default: {DEFAULT_TOKENS})",
    )
    parser.add_argument(
        "--sae",
        metavar="RUN",
        help="a sparse autoencoder on activations of this checkpoint: the cards of that layer's tiles show the latents that go "
        "with them, as `trix sae tiles` finds them",
    ).complete = FILE
    parser.add_argument(
        "--dump", metavar="DIR", help="with --sae: the dump that it learned from, where it has been moved"
    ).complete = FILE
    parser.add_argument(
        "--autoencoder", metavar="NAME", help="with --sae: which of several in that run (default: the main one)"
    )
    parser.add_trust()
    return parser
