"""A page to read next to the logs of a run."""

from pathlib import Path

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from rich import get_console
from typing_extensions import override

from lightning_modules.callbacks.last_checkpoint import written_checkpoint
from lightning_modules.callbacks.log_folder import local_log_folder, relative_path
from lightning_modules.checkpoint_data import run_data
from lightning_modules.checkpoint_page import make_page
from lightning_modules.error_text import one_line
from lightning_modules.routed_layers import routed_layers
from lightning_modules.tasks.checkpoint import load_checkpoint
from trix.whole_file import write_whole

PAGE_NAME = "report.html"


class ReportPage(L.Callback):
    """At the end of ``fit`` write report.html into the folder of the logs: the page of ``trix inspect``.

    It is about the best checkpoint of the run; where there is none, the last. A run without logs or without checkpoints leaves
    none, nor does a trial (fast_dev_run) or a network without routed layers. A page that cannot be drawn is a warning.

    ``trix`` adds it to every ``fit``, with its settings as ``report``: ``--report.num_tokens 0`` leaves the page out.

    Args:
        num_tokens: largest number of tokens of the validation data that it is drawn from; at least one sequence is. 0: no page.

    Raises:
        ValueError: num_tokens < 0.
    """

    def __init__(self, num_tokens: int = 4096) -> None:
        if num_tokens < 0:
            raise ValueError(f"num_tokens ({num_tokens}) must be >= 0")
        self.num_tokens = num_tokens
        self._folder: Path | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._folder = local_log_folder(trainer) if stage == "fit" else None

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        written = written_checkpoint(trainer)
        is_wanted = self.num_tokens > 0 and trainer.is_global_zero and len(routed_layers(pl_module)) > 0
        if not is_wanted or self._folder is None or written is None:
            return
        (checkpoint_path, _), page_path = written, self._folder / PAGE_NAME
        try:
            # The classes that this run is made of are trusted, for it has been running them.
            parts = (pl_module, getattr(trainer, "datamodule", None))
            trusted = [type(part).__module__ for part in parts if part is not None]
            task, checkpoint = load_checkpoint(checkpoint_path, trusted)
            data = run_data(task, checkpoint, checkpoint_path, trusted)
            page = make_page(task, data, checkpoint, str(checkpoint_path), self.num_tokens)
            write_whole(page.encode(), page_path)
        except Exception as error:  # whatever it is, the run is done and its weights are kept
            rank_zero_warn(f"{PAGE_NAME} could not be drawn: {one_line(error)}")
            return
        get_console().print(f"report       {relative_path(page_path)}", highlight=False, markup=False, soft_wrap=True)
