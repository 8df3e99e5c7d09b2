"""What a run leaves next to its config.yaml, so that it can be repeated and compared: environment.json and metrics.csv."""

import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from typing_extensions import override

from lightning_modules.callbacks.last_checkpoint import withdraw_copies
from lightning_modules.callbacks.log_folder import local_log_folder
from lightning_modules.data.data_module import digests
from lightning_modules.error_text import one_line
from lightning_modules.errors import UserError
from lightning_modules.machine import cpu_name, git_state
from trix.regular_files import read_regular
from trix.whole_file import write_whole

ENVIRONMENT_NAME, METRICS_NAME = "environment.json", "metrics.csv"
MAX_METRICS_BYTES, MAX_METRICS_ROWS = 2**27, 500_000
PACKAGES = ("trix", "torch", "lightning", "numpy")


class RunRecord(L.Callback):
    """Write environment.json and metrics.csv into the folder of the logs, where config.yaml is.

    environment.json: the arguments of the command, the working folder (from which relative paths in config.yaml count), its git
    commit, the versions, the machine, the digests of the data, and the checkpoint that the run goes on from. metrics.csv: all
    that is logged, written as it is logged; that of a resumed run begins with the rows of the earlier one up to the checkpoint,
    so that it is whole.

    ``trix`` adds it to every ``fit``. A run without logs leaves neither, nor does a trial (fast_dev_run).

    Args:
        arguments: those of the command.
    """

    def __init__(self, arguments: Sequence[str] = ()) -> None:
        self._arguments = list(arguments)
        self._checkpoint_path: Path | None = None
        self._earlier_folder: Path | None = None
        self._folder = ""
        self._metrics: MetricsLogger | None = None
        self._is_restoring, self._first_step = False, 0

    def go_on_from(self, checkpoint_path: Path, earlier_folder: Path | None) -> None:
        """Say before the run starts what it resumes, and where the run that wrote the checkpoint has its logs."""
        self._checkpoint_path, self._earlier_folder = checkpoint_path, earlier_folder

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._is_restoring = self._checkpoint_path is not None
        folder = local_log_folder(trainer) if stage == "fit" else None
        if folder is None:
            return
        self._folder = folder.name
        if not any(isinstance(logger, CSVLogger) for logger in trainer.loggers):
            self._metrics = MetricsLogger(folder)
            trainer.loggers = [*trainer.loggers, self._metrics]
        if trainer.is_global_zero:
            datamodule: L.LightningDataModule | None = getattr(trainer, "datamodule", None)
            content = {
                "arguments": self._arguments,
                "folder": str(Path.cwd()),
                "resumed_from": None if self._checkpoint_path is None else str(self._checkpoint_path),
                **environment(),
                "data": data_digests(datamodule),
            }
            write_whole((json.dumps(content, indent=2) + "\n").encode(), folder / ENVIRONMENT_NAME)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Raise UserError where Lightning or a callback fails at what the checkpoint says of the training's state."""
        is_bad_state = self._is_restoring and isinstance(exception, Exception)
        if is_bad_state and not isinstance(exception, UserError | OSError | MemoryError | torch.OutOfMemoryError):
            withdraw_copies(trainer)
            reason = one_line(f"{type(exception).__name__}: {exception}")
            raise UserError(f"{self._checkpoint_path}: the state of the training does not fit ({reason})") from exception

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._first_step = trainer.global_step
        if self._metrics is not None and self._earlier_folder is not None:
            self._metrics.take_over(read_metrics(self._earlier_folder / METRICS_NAME), trainer.global_step)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        # Not before the first step: optimizers and schedules read their state as they are used.
        self._is_restoring &= trainer.global_step == self._first_step

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"folder": self._folder}


class MetricsLogger(CSVLogger):
    """Lightning's CSVLogger, for one folder, on the disk at every row; it can go on where an earlier file ended."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent, name="", version=folder.name, flush_logs_every_n_steps=1)
        self._taken_over: set[tuple[int, frozenset[str]]] = set()

    def take_over(self, rows: Sequence[Mapping[str, float]], last_step: int) -> None:
        """Begin with the rows up to last_step; what the resumed run logs a second time is left out then.

        A step logs its rows before and after its checkpoint, and Lightning numbers the rows of training from 0 while callbacks
        number theirs by the steps done: rows alone do not tell which of them the checkpoint comes after.
        """
        for row in rows:
            if row["step"] <= last_step:
                values: dict[str, Any] = {name: value for name, value in row.items() if name != "step"}
                self.experiment.log_metrics(values, int(row["step"]))
                self._taken_over.add((int(row["step"]), frozenset(values)))
        self.save()

    @override
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if (step, frozenset(metrics)) not in self._taken_over:
            super().log_metrics(metrics, step)

    @override
    def save(self) -> None:
        try:
            super().save()
        except OSError as error:  # that of a full disk names no file
            raise OSError(error.errno, error.strerror, str(Path(self.log_dir) / METRICS_NAME)) from error


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with the values that it has; none without a file, nor of a row that was cut short.

    Raises:
        UserError: it is no CSV in UTF-8, or larger than MAX_METRICS_BYTES.
    """
    if not path.is_file():
        return []
    rows = []
    try:
        whole, _, _ = read_regular(path, MAX_METRICS_BYTES).decode().rpartition("\n")
        if (num_rows := whole.count("\n")) > MAX_METRICS_ROWS:
            raise UserError(f"number of rows in {path} ({num_rows}) must be <= {MAX_METRICS_ROWS}")
        for row in csv.DictReader(io.StringIO(whole)):
            with suppress(ValueError, TypeError, KeyError):
                rows.append(
                    {name: _number(value) for name, value in row.items() if value and name} | {"step": int(row["step"])}
                )
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path} must be CSV in UTF-8: {error}") from error
    return rows


def environment() -> dict[str, Any]:
    """Where a run takes place, as plain values."""
    return {
        "python": platform.python_version(),
        "packages": {name: _package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "git": git_state(Path.cwd()),
    }


def data_digests(datamodule: L.LightningDataModule | None) -> dict[str, str]:
    """The class of the data, and its digests."""
    return {} if datamodule is None else {"class": type(datamodule).__name__} | digests(datamodule)


def _package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _number(text: str) -> float:
    return int(text) if text.isdecimal() else float(text)
