"""``trix export``: write a checkpoint as one ONNX file with packed ternary weights, checked against torch, or as a folder."""

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.checkpoint_data import run_data
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_file import check_new_folder, check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched
from trix.whole_file import whole_folder

ONNX_FILE, CARD_FILE = "model.onnx", "README.md"

if TYPE_CHECKING:
    from ort_ops.export import ExportReport
    from ort_ops.file_format import Activations


def run_export(arguments: list[str]) -> int:
    """Export, and print what was written and how it compares with torch on held-out data."""
    options = make_parser().parse_strictly(arguments)
    ckpt = best_checkpoint(Path(options.ckpt))
    if (options.output is None) == (options.hub_folder is None):
        raise UserError("one of --output FILE and --hub-folder FOLDER must be given; see `trix export --help`")
    output = Path(options.hub_folder if options.output is None else options.output)
    if options.hub_folder is None:
        check_output_file(output, ckpt, kept=(".ckpt",))  # an export may be made again
    else:
        check_new_folder(output)
    if options.held_out_tokens < 2:
        raise UserError(f"--held-out-tokens ({options.held_out_tokens}) must be >= 2")
    if options.group_size is not None and options.activation_bits != 8:
        raise UserError(f"--group-size ({options.group_size}) belongs to --activation-bits 8, not {options.activation_bits}")
    from ort_ops.file_format import Activations

    activations = Activations(options.activation_bits, 128 if options.group_size is None else options.group_size)
    trusted = trusted_modules(options.trust)
    try:
        with working_folder_searched(trusted), output_folder(output.parent):
            report = (export_checkpoint if options.hub_folder is None else export_folder)(
                ckpt,
                output,
                not options.no_fallback,
                options.held_out_tokens,
                activations,
                trusted,
                external_data=options.external_data,
            )
    except OSError as error:  # reading has errors of its own
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"wrote   {output}")
    print(report)
    return 0


def export_checkpoint(
    ckpt: Path | str,
    output: Path,
    fallback: bool,
    held_out_tokens: int,
    activations: "Activations",
    trusted: Collection[str] = (),
    *,
    external_data: bool = False,
) -> "ExportReport":
    """Rebuild the task and the data of a checkpoint, and export its network as the task says.

    Args:
        ckpt: a file written by `trix fit`. output: the file to write, in a folder that exists.
        fallback: also write the operators' portable definition.
        held_out_tokens: largest number of tokens of the validation data that are compared with torch.
        activations: what the file's ternary products read.
        trusted: the modules, besides this project's, whose task, data and parts of a network the checkpoint may name.
        external_data: write the weights to a file next to it.

    Raises:
        CheckpointError, DataError, and what ``ort_ops.export`` raises.
    """
    from lightning_modules.tasks import load_checkpoint

    task, checkpoint = load_checkpoint(ckpt, trusted)
    exporter = task.exportable(run_data(task, checkpoint, ckpt, trusted), held_out_tokens)
    return exporter(output, fallback=fallback, activations=activations, external_data=external_data)


def export_folder(
    ckpt: Path,
    folder: Path,
    fallback: bool,
    held_out_tokens: int,
    activations: "Activations",
    trusted: Collection[str] = (),
    *,
    external_data: bool = False,
) -> "ExportReport":
    """As :func:`export_checkpoint`, to a new folder for the Hugging Face Hub: model.onnx, the weights as safetensors with their
    config.json, and README.md, the card."""
    from lightning_modules.model_card import model_card
    from lightning_modules.tasks import load_checkpoint
    from lightning_modules.tasks.hub import write_pretrained

    task, checkpoint = load_checkpoint(ckpt, trusted)
    data = run_data(task, checkpoint, ckpt, trusted)
    with whole_folder(folder) as partial:
        exporter = task.exportable(data, held_out_tokens)
        report = exporter(partial / ONNX_FILE, fallback=fallback, activations=activations, external_data=external_data)
        write_pretrained(task, partial)
        with ckpt.open("rb") as file:
            facts = {"SHA-256 of the checkpoint": hashlib.file_digest(file, "sha256").hexdigest(), **data.facts()}
        card = model_card(folder.resolve().name, task, checkpoint, facts, report)
        (partial / CARD_FILE).write_text(card, encoding="utf-8")
    return report


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix export",
        description="Write a checkpoint as one ONNX file with packed ternary weights, and compare it with torch. With "
        "--hub-folder, write a folder for the Hugging Face Hub: that file, the weights as safetensors, and a card.",
        epilog="examples:\n"
        "  trix export --ckpt runs/char_lm --output runs/char_lm/model.onnx\n"
        "  trix export --ckpt runs/char_lm/version_0/checkpoints/last.ckpt --output last.onnx\n"
        "  trix export --ckpt runs/char_lm --output runs/char_lm/fast.onnx --activation-bits 8\n"
        "  trix export --ckpt runs/char_lm --hub-folder char_lm",
    )
    parser.add_argument("--ckpt", required=True, help=CHECKPOINT_HELP).complete = FILE
    parser.add_argument("--output", help="the ONNX file to write").complete = FILE
    parser.add_argument(
        "--hub-folder",
        metavar="FOLDER",
        help="instead of a file, a new folder to write: model.onnx, model.safetensors, config.json, and README.md, a card with "
        "data, metrics, surgery history, parity and limits",
    ).complete = FILE
    parser.add_argument(
        "--no-fallback",
        action="store_true",
        help="leave out the operators' portable definition: the file then needs the native operators",
    )
    parser.add_argument(
        "--external-data",
        action="store_true",
        help="write the weights to a second file, OUTPUT.DIGEST.data, as is done anyway where they exceed the 2 GB of one file",
    )
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        default=4096,
        help="largest number of tokens of the validation data to compare with torch on (default: %(default)s)",
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=(24, 8),
        default=24,
        help="bits of what the ternary products read: 24 is nearly as exact as float32; 8 is faster, and what it changes is "
        "told (default: %(default)s)",
    )
    parser.add_argument(
        "--group-size",
        type=int,
        choices=(128, 0),
        help="with 8 bits, how many columns share a scale, 128, or 0 for all: faster, less exact (default: 128)",
    )
    parser.add_trust()
    return parser
