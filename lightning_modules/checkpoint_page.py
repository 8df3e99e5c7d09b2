"""The HTML page about a checkpoint: what each tile responds to, measured on the validation data of the training."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.checkpoint_data import held_out, make_labelled_data, make_text
from lightning_modules.errors import UserError

if TYPE_CHECKING:
    from lightning_modules.tasks import RoutedTask


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
