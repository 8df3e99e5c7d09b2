"""``trix export``: write a checkpoint as one ONNX file with packed ternary weights, checked against torch."""

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.checkpoint_data import run_data
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.trust import trusted_modules, working_folder_searched

if TYPE_CHECKING:
    from ort_ops.export import ExportReport
    from ort_ops.file_format import Activations


def run_export(arguments: list[str]) -> int:
    """Export, and print what was written and how it compares with torch on held-out data."""
    options = make_parser().parse_strictly(arguments)
    ckpt, output = best_checkpoint(Path(options.ckpt)), Path(options.output)
    check_output_file(output, ckpt, kept=(".ckpt",))  # an export may be made again
    if options.held_out_tokens < 2:
        raise UserError(f"--held-out-tokens ({options.held_out_tokens}) must be >= 2")
    if options.group_size is not None and options.activation_bits != 8:
        raise UserError(f"--group-size ({options.group_size}) belongs to --activation-bits 8, not {options.activation_bits}")
    from ort_ops.file_format import Activations

    activations = Activations(options.activation_bits, 128 if options.group_size is None else options.group_size)
    trusted = trusted_modules(options.trust)
    try:
        with working_folder_searched(trusted), output_folder(output.parent):
            report = export_checkpoint(
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


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix export",
        description="Write a checkpoint as one ONNX file with packed ternary weights, and compare it with torch.",
        epilog="examples:\n"
        "  trix export --ckpt runs/char_lm --output runs/char_lm/model.onnx\n"
        "  trix export --ckpt runs/char_lm/version_0/checkpoints/last.ckpt --output last.onnx\n"
        "  trix export --ckpt runs/char_lm --output runs/char_lm/fast.onnx --activation-bits 8",
    )
    parser.add_argument("--ckpt", required=True, help=CHECKPOINT_HELP).complete = FILE
    parser.add_argument("--output", required=True, help="the ONNX file to write").complete = FILE
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
