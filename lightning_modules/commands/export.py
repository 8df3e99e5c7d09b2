"""``trix export``: write a checkpoint as one ONNX file with packed ternary weights, checked against torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.checkpoint_data import make_labelled_data, make_text
from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint

if TYPE_CHECKING:
    from ort_ops.export import ExportReport


def run_export(arguments: list[str]) -> int:
    """Export, and print what was written and how it compares with torch on held-out data."""
    options = make_parser().parse_strictly(arguments)
    ckpt, output = best_checkpoint(Path(options.ckpt)), Path(options.output)
    check_output_file(output, ckpt, kept=(".ckpt",))  # an export may be made again
    if options.held_out_tokens < 2:
        raise UserError(f"--held-out-tokens ({options.held_out_tokens}) must be >= 2")
    try:
        with output_folder(output.parent):
            report = export_checkpoint(ckpt, output, fallback=not options.no_fallback, held_out_tokens=options.held_out_tokens)
    except OSError as error:  # reading has errors of its own
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"wrote   {output}")
    print(report)
    return 0


def export_checkpoint(ckpt: Path | str, output: Path, fallback: bool, held_out_tokens: int) -> "ExportReport":
    """Rebuild the task and the data of a checkpoint, and export its network.

    Args:
        ckpt: a file written by `trix fit`. output: the file to write, in a folder that exists.
        fallback: also write the operators' portable definition.
        held_out_tokens: at most so many tokens of the validation data are used to compare with torch.

    Raises:
        CheckpointError, DataError, and what ``ort_ops.export`` raises.
    """
    from lightning_modules.tasks import ClassifierTask, LanguageModelTask, load_checkpoint
    from ort_ops.export import export_classifier, export_language_model

    task, checkpoint = load_checkpoint(ckpt)
    if isinstance(task, LanguageModelTask):
        text = make_text(task, checkpoint, ckpt)
        num_tokens = min(held_out_tokens, len(text.val_dataloader().dataset) * text.context_length)  # type: ignore[arg-type]
        return export_language_model(task.network, task.vocabulary, text.held_out_tokens(num_tokens), output, fallback)
    if isinstance(task, ClassifierTask):
        import torch

        data = make_labelled_data(task, checkpoint, ckpt)
        inputs = torch.cat([inputs for inputs, _ in data.val_dataloader()])
        num_examples = max(held_out_tokens // inputs.shape[1], 1)
        return export_classifier(task.network, list(task.class_names), inputs[:num_examples], output, fallback, task.vocabulary)
    raise UserError(
        f"task ({task.task_name}) must be {LanguageModelTask.task_name} or {ClassifierTask.task_name} to be exported"
    )


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix export",
        description="Write a checkpoint as one ONNX file with packed ternary weights, and compare it with torch.",
        epilog="examples:\n"
        "  trix export --ckpt runs/char_lm --output runs/char_lm/model.onnx\n"
        "  trix export --ckpt runs/char_lm/version_0/checkpoints/last.ckpt --output last.onnx",
    )
    parser.add_argument("--ckpt", required=True, help=CHECKPOINT_HELP).complete = FILE
    parser.add_argument("--output", required=True, help="the ONNX file to write").complete = FILE
    parser.add_argument(
        "--no-fallback",
        action="store_true",
        help="leave out the operators' portable definition: the file then needs the native operators",
    )
    parser.add_argument(
        "--held-out-tokens",
        type=int,
        default=4096,
        help="compare with torch on at most so many tokens of the validation data (default: %(default)s)",
    )
    return parser
