"""``trix export``: write a checkpoint as one ONNX file with packed ternary weights, checked against torch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_modules.commands.arguments import CommandParser
from lightning_modules.errors import DataError, UserError

if TYPE_CHECKING:
    from ort_ops.export import ExportReport

DataT = TypeVar("DataT")


def run_export(arguments: list[str]) -> int:
    """Export, and print what was written and how it compares with torch on held-out data."""
    options = _parser().parse_strictly(arguments)
    output = Path(options.output)
    _check_options(Path(options.ckpt), output, options.held_out_tokens)
    try:
        with _folder(output.parent):
            report = export_checkpoint(
                options.ckpt, output, fallback=not options.no_fallback, held_out_tokens=options.held_out_tokens
            )
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
    from lightning_modules.data.digits import DigitsDataModule
    from lightning_modules.data.language_id import LanguageIdDataModule
    from lightning_modules.data.text import TextDataModule
    from lightning_modules.tasks import ClassifierTask, LanguageModelTask, load_checkpoint
    from ort_ops.export import export_classifier, export_language_model

    task, checkpoint = load_checkpoint(ckpt)
    if isinstance(task, LanguageModelTask):
        text = _make_data(TextDataModule, checkpoint, ckpt)
        if text.vocabulary != task.vocabulary:
            raise DataError(
                f"the text's vocabulary ({text.vocab_size} characters) must equal the checkpoint's "
                f"({len(task.vocabulary)} characters): the text has changed since the training"
            )
        num_tokens = min(held_out_tokens, len(text.val_dataloader().dataset) * text.context_length)  # type: ignore[arg-type]
        return export_language_model(task.network, task.vocabulary, text.held_out_tokens(num_tokens), output, fallback)
    if isinstance(task, ClassifierTask):
        import torch

        data: DigitsDataModule | LanguageIdDataModule
        if task.vocabulary is None:
            data = _make_data(DigitsDataModule, checkpoint, ckpt)
        else:
            data = _make_data(LanguageIdDataModule, checkpoint, ckpt)
        inputs = torch.cat([inputs for inputs, _ in data.val_dataloader()])
        num_examples = max(held_out_tokens // inputs.shape[1], 1)
        return export_classifier(task.network, list(task.class_names), inputs[:num_examples], output, fallback, task.vocabulary)
    raise UserError(
        f"task ({task.task_name}) must be {LanguageModelTask.task_name} or {ClassifierTask.task_name} to be exported"
    )


def _make_data(kind: Callable[..., DataT], checkpoint: dict[str, Any], path: Path | str) -> DataT:
    """The data module that the network was trained on, for held-out data."""
    from lightning_modules.tasks.routed_task import CHECKPOINT_KEY

    settings = checkpoint.get("datamodule_hyper_parameters")
    name = checkpoint[CHECKPOINT_KEY].get("data")
    wanted = getattr(kind, "__name__", "")
    if not isinstance(settings, dict) or name != wanted:
        raise UserError(f"{path}: data module ({name}) must be {wanted}, from which held-out data is taken")
    try:
        return kind(**settings)
    except TypeError as error:
        raise UserError(f"{path}: the data settings of the checkpoint do not fit: {error}") from error


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """Make the folder and those above it; should the export fail, the new ones go again."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _check_options(ckpt: Path, output: Path, held_out_tokens: int) -> None:
    # Before anything slow: a mistyped output is told at once, and nothing but a file is ever replaced.
    try:
        if output.is_dir():
            raise UserError(f"output {output} must be a file, not a directory")
        if output.exists() and not output.is_file():
            raise UserError(f"output {output} must be a file, not a device or pipe")
        if output.exists() and ckpt.exists() and output.samefile(ckpt):
            raise UserError(f"output {output} must be another file than the checkpoint, which it would replace")
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    if held_out_tokens < 2:
        raise UserError(f"--held-out-tokens ({held_out_tokens}) must be >= 2")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="trix export",
        description="Write a checkpoint as one ONNX file with packed ternary weights, and compare it with torch.",
        epilog="example:\n  trix export --ckpt runs/char_lm/best.ckpt --output runs/char_lm/model.onnx",
    )
    parser.add_argument("--ckpt", required=True, help="a checkpoint written by `trix fit`")
    parser.add_argument("--output", required=True, help="the ONNX file to write")
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
