"""``trix inspect``: one HTML page about a checkpoint or an exported model, layer by layer and tile by tile."""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.commands.arguments import CHECKPOINT_HELP, FILE, CommandParser
from lightning_modules.commands.checkpoint_data import held_out, load_task, make_labelled_data, make_text
from lightning_modules.commands.output_file import check_output_file, output_folder
from lightning_modules.errors import UserError
from lightning_modules.run_folder import best_checkpoint
from lightning_modules.whole_bytes import write_whole

if TYPE_CHECKING:
    from lightning_modules.tasks import RoutedTask

DEFAULT_TOKENS = 4096


def run_inspect(arguments: list[str]) -> int:
    """Write the page, and print where it is."""
    options = make_parser().parse_strictly(arguments)
    model = best_checkpoint(Path(options.model))
    output = model.parent / f"{model.stem}.html" if options.output is None else Path(options.output)
    check_output_file(output, model)
    if options.num_tokens is not None and options.num_tokens < 1:
        raise UserError(f"--num-tokens ({options.num_tokens}) must be >= 1")
    page = _page_maker(model, options)
    try:
        with output_folder(output.parent):
            write_whole(page().encode(), output.resolve())  # a link stays, the file that it names is replaced
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{model}: {error}") from error
    except OSError as error:
        raise UserError(f"output {output} cannot be written: {error.strerror or error}") from error
    print(f"wrote   {output}  (open it in a browser)")
    return 0


def _page_maker(model: Path, options: Namespace) -> Callable[[], str]:
    """What makes the page; a checkpoint is read at once."""
    if model.suffix.lower() == ".onnx":
        from lightning_modules.commands.inspect_onnx import make_onnx_page

        if options.num_tokens is not None:
            raise UserError("--num-tokens belongs to a checkpoint: an exported model has no data but its own example")
        return functools.partial(make_onnx_page, model)
    task, checkpoint = load_task(str(model), "inspect")
    return functools.partial(make_page, task, checkpoint, str(model), options.num_tokens or DEFAULT_TOKENS)


def make_page(task: "RoutedTask", checkpoint: dict[str, Any], ckpt: str, num_tokens: int) -> str:
    """The page about a task, measured on at most num_tokens tokens of its own validation data (at least one sequence).

    Raises:
        UserError: the data cannot be rebuilt; ValueError: the network has no routed layers.
    """
    from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
    from rich.console import Console
    from rich.progress import track

    from lightning_modules.tasks import ClassifierTask, LanguageModelTask
    from trix.introspection import html_report

    facts = {
        "checkpoint": ckpt,
        "task": task.task_name.replace("_", " "),
        "size": f"{get_human_readable_count(sum(parameter.numel() for parameter in task.parameters()))} parameters",
        "training": f"{checkpoint['global_step']:,} steps",
    }
    console = Console(stderr=True)
    shown: dict[str, Any] = {
        "title": f"TriX report: {Path(ckpt).name}",
        "facts": facts,
        "track": functools.partial(track, console=console, transient=True, disable=not console.is_terminal),
    }
    if isinstance(task, LanguageModelTask):
        text = make_text(task, checkpoint, ckpt)
        facts["data"] = f"validation text of {text.hparams['path'] or text.hparams['corpus']}, character by character"
        inputs, _ = held_out(text, num_tokens)
        tokens = [[task.vocabulary[token] for token in sequence] for sequence in inputs.tolist()]
        return html_report(task.network, inputs, tokens, **shown)
    if isinstance(task, ClassifierTask):
        inputs, labels = held_out(make_labelled_data(task, checkpoint, ckpt), num_tokens)
        shown |= {"labels": labels, "class_names": task.class_names}
        if task.vocabulary is None:
            facts["data"] = "validation images of the handwritten digits; a token is one row of an image"
            return html_report(task.network, inputs, **shown)
        facts["data"] = "validation texts in many languages, character by character; padding is not counted"
        shown_as = ["", *task.vocabulary[1:]]  # token 0 is padding
        return html_report(task.network, inputs, [[shown_as[token] for token in row] for row in inputs.tolist()], **shown)
    raise UserError(f"task ({task.task_name}) must be {LanguageModelTask.task_name} or {ClassifierTask.task_name}")


def make_parser() -> CommandParser:
    parser = CommandParser(
        prog="trix inspect",
        description="Write one HTML page about a checkpoint: what each tile responds to, its usage, what lands on it.\n"
        "Of an exported model (no torch needed): what it is, how it agrees with torch, its signatures and their history.",
        epilog="examples:\n"
        "  trix inspect runs/char_lm\n"
        "  trix inspect runs/char_lm/version_0/checkpoints/last.ckpt --output report.html\n"
        "  trix inspect runs/char_lm/model.onnx",
    )
    parser.add_argument("model", metavar="MODEL", help=f"{CHECKPOINT_HELP}, or a file written by `trix export`").complete = FILE
    parser.add_argument(
        "--output", help="the HTML file to write (default: beside the checkpoint or model, with the ending .html)"
    ).complete = FILE
    parser.add_argument(
        "--num-tokens",
        type=int,
        help="measure a checkpoint on at most so many tokens of the validation data, in whole sequences "
        f"(default: {DEFAULT_TOKENS})",
    )
    return parser
