"""The HTML page about a checkpoint: what each tile responds to, measured on the validation data of the training."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.data import RunData
    from lightning_modules.tasks import TrixTask


def make_page(
    task: "TrixTask",
    data: "RunData",
    checkpoint: dict[str, Any],
    ckpt: str,
    num_tokens: int,
    remarks: Mapping[int, Sequence[str]] | None = None,
) -> str:
    """The page about a task, measured on at most num_tokens tokens of its own validation data (at least one example).

    Args:
        remarks: HTML for the cards of tiles, see :func:`trix.introspection.html_report`.

    Raises:
        UserError: the data cannot be rebuilt; ValueError: the network has no routed layers.
    """
    from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
    from rich.console import Console
    from rich.progress import track

    from trix.introspection import html_report

    page = task.page(data, num_tokens)
    facts = {
        "checkpoint": ckpt,
        "task": task.task_name.replace("_", " "),
        "size": f"{get_human_readable_count(sum(parameter.numel() for parameter in task.parameters()))} parameters",
        "training": f"{checkpoint['global_step']:,} steps",
        **page.facts,
    }
    console = Console(stderr=True)
    return html_report(
        page.network,
        page.inputs,
        page.tokens,
        title=f"TriX report: {Path(ckpt).name}",
        labels=page.labels,
        class_names=page.class_names,
        facts=facts,
        track=functools.partial(track, console=console, transient=True, disable=not console.is_terminal),
        counted=page.counted,
        remarks=remarks,
    )
