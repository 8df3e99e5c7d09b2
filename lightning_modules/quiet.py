"""Keep what Lightning says about itself out of the way, so that what the run says can be read."""

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

# Said at every run, whatever the run does.
_ROUTINE_MESSAGES = (
    "GPU available",
    "TPU available",
    "HPU available",
    "💡 Tip",
    "Seed set to",
    "Restoring states from",
    "Restored all states",
    "Loaded model weights",
    "`Trainer.fit` stopped",
    "Running in `fast_dev_run`",
    "You are using the plain ModelCheckpoint",
    "\nDetected KeyboardInterrupt",
    "`Trainer(",
    "Received SIGTERM",
    "Initializing distributed",
    "-" * 100,  # around how many processes there are
)
_RANK = re.compile(r"^\[rank: \d+\] ")
_ROUTINE_WARNINGS = (
    r".*does not have many workers",  # batches are made in place, from memory
    r".*Checkpoint directory .* exists and is not empty",  # a new run replaces the files, as its configuration says
    r".*The number of training batches .* is smaller than the logging interval",
    r".*isinstance\(treespec, LeafSpec\)",
    r".*The `srun` command is available",
    r".*Experiment logs directory .* exists and is not empty",
    r".*Found \d+ module\(s\) in eval mode",
    r".*GPU available but not used",
    r".*callbacks used to create the checkpoint need to be provided",  # validate, test and predict do without them
    r".*The dirpath has changed from",  # LastCheckpoint takes over what is to be kept; the other commands write no checkpoint
    r".*`training_step` returned `None`",  # a batch that AutoRecovery has left out, and told of
    r".*It is recommended to use `self\.log\(.*sync_dist=True",  # torchmetrics has summed over processes
)


class _RoutineFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not _RANK.sub("", record.getMessage()).startswith(_ROUTINE_MESSAGES)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Drop routine messages and warnings; other warnings become one line each, "trix: warning: ..."."""
    handlers = [
        handler
        for name in ("lightning.pytorch", "lightning.fabric", "lightning")
        for handler in logging.getLogger(name).handlers
    ]
    routine = _RoutineFilter()
    for handler in handlers:
        handler.addFilter(routine)
    try:
        with warnings.catch_warnings():
            for pattern in _ROUTINE_WARNINGS:
                warnings.filterwarnings("ignore", message=pattern)
            warnings.showwarning = _show_warning
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(routine)


def _show_warning(message: Warning | str, *_place: object, file: TextIO | None = None, **_line: object) -> None:
    print(f"trix: warning: {' '.join(str(message).split())}", file=file or sys.stderr)
