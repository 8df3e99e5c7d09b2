"""A folder of checkpoints: the last few, and the best."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_modules.error_text import did_you_mean
from lightning_modules.tasks.checkpoint_file import load_plain
from lightning_modules.tasks.task import CheckpointError
from lightning_modules.whole_files import CHECKPOINT_SUFFIX, WholeFileCheckpointIO

Direction = Literal["min", "max"]
DIRECTIONS: dict[str, Direction] = {"perplexity": "min", "loss": "min", "accuracy": "max"}
_NAME = re.compile(rf"epoch_(\d+){re.escape(CHECKPOINT_SUFFIX)}")


class CheckpointManager:
    """Keep the checkpoints of the last epochs, and of each metric the best.

    A file, ``epoch_N.ckpt``, is written whole or not at all, and read as plain data: no code in it is ever run. It holds
    ``epoch``, ``state_dict``, ``optimizer_states`` (of one optimizer) and ``metrics``, named as in Lightning's checkpoints, and
    ``config``, where the model has one that is a dataclass, for :meth:`trix.resnet_bk.LanguageModel.from_checkpoint`.
    An epoch that is saved again replaces its file. Nothing but such files is ever removed.

    Args:
        checkpoint_dir: folder of the checkpoints; it is made when the first one is written.
        keep_last_n: >= 1, the number of latest epochs that are kept besides the best.
        directions: "min" or "max" by name, whether small or large values of a metric are good; besides those of
            ``DIRECTIONS``.

    Raises:
        ValueError: keep_last_n < 1, or a direction is neither.
    """

    def __init__(
        self, checkpoint_dir: Path | str, keep_last_n: int = 3, *, directions: Mapping[str, Direction] | None = None
    ) -> None:
        if keep_last_n < 1:
            raise ValueError(f"keep_last_n ({keep_last_n}) must be >= 1")
        self.checkpoint_dir, self.keep_last_n = Path(checkpoint_dir), keep_last_n
        self.directions = {**DIRECTIONS, **(directions or {})}
        for name, direction in self.directions.items():
            if direction not in ("min", "max"):
                raise ValueError(f"direction of {name} ({direction!r}) must be 'min' or 'max'")
        self._files = WholeFileCheckpointIO()
        self._known: dict[Path, dict[str, float]] = {}  # the metrics of files that have been read or written

    def save(self, model: nn.Module, optimizer: Optimizer, epoch: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Write the checkpoint of an epoch, then remove those that are neither recent nor the best of a metric.

        Raises:
            ValueError: epoch < 0, or the direction of a metric is not known. OSError: the file cannot be written.
        """
        if epoch < 0:
            raise ValueError(f"epoch ({epoch}) must be >= 0")
        values = {name: float(value) for name, value in (metrics or {}).items()}
        for name in values:
            self._direction(name)
        content = {
            "epoch": epoch,
            "state_dict": model.state_dict(),
            "optimizer_states": [optimizer.state_dict()],
            "metrics": values,
        }
        content |= config_entry(model)
        self._files.save_checkpoint(content, self.checkpoint_dir / f"epoch_{epoch}{CHECKPOINT_SUFFIX}")
        self._known[self.checkpoint_dir / f"epoch_{epoch}{CHECKPOINT_SUFFIX}"] = values
        paths = self._paths()
        old = paths[: -self.keep_last_n]
        if not old:
            return
        metrics_of = self._metrics(paths)
        best = {self._best(metrics_of, name) for known in metrics_of.values() for name in known}
        for path in old:
            if path not in best:
                self._files.adopt(path)  # an earlier process may have written it
                self._files.remove_checkpoint(path)

    def load_latest(self) -> dict[str, Any]:
        """The content of the checkpoint of the last epoch, on the CPU.

        Raises:
            CheckpointError: there is none, or it cannot be read as plain data.
        """
        paths = self._paths()
        if not paths:
            raise CheckpointError(f"{self.checkpoint_dir} must hold a checkpoint (epoch_N{CHECKPOINT_SUFFIX})")
        return _content(paths[-1])

    def load_best(self, metric: str = "perplexity") -> dict[str, Any]:
        """The content of the checkpoint with the best value of a metric, on the CPU; of equal ones the earliest.

        Raises:
            ValueError: the metric's direction is not known. CheckpointError: no checkpoint has the metric, or as load_latest.
        """
        self._direction(metric)
        metrics_of = {path: _metrics(path) for path in self._paths()}
        best = self._best(metrics_of, metric)
        if best is None:
            names = sorted({name for metrics in metrics_of.values() for name in metrics})
            found = f"they have {', '.join(names)}" if names else "none has any metric"
            raise CheckpointError(f"a checkpoint in {self.checkpoint_dir} must have the metric {metric}: {found}")
        return _content(best)

    def _metrics(self, paths: Sequence[Path]) -> dict[Path, dict[str, float]]:
        """The metrics of each file; one that cannot be read has none, and a warning says so."""
        for path in paths:
            if path in self._known:
                continue
            try:
                self._known[path] = _metrics(path)
            except CheckpointError as error:
                rank_zero_warn(f"{path} is passed over: {error}")
                self._known[path] = {}
        return {path: self._known[path] for path in paths}

    def _direction(self, metric: str) -> Direction:
        if metric not in self.directions:
            raise ValueError(
                f"direction of metric {metric} must be declared, as directions={{{metric!r}: 'min'}}"
                f"{did_you_mean(metric, self.directions)}"
            )
        return self.directions[metric]

    def _best(self, metrics_of: Mapping[Path, Mapping[str, float]], metric: str) -> Path | None:
        """The file with the best value; one that is not a number is never the best."""
        sign = 1.0 if self.directions.get(metric, "min") == "min" else -1.0
        values = {path: sign * metrics[metric] for path, metrics in metrics_of.items() if metric in metrics}
        return min(
            (path for path, value in values.items() if not math.isnan(value)), key=lambda path: values[path], default=None
        )

    def _paths(self) -> list[Path]:
        """Our checkpoints, from the first epoch to the last."""
        epochs = {path: _NAME.fullmatch(path.name) for path in self.checkpoint_dir.glob(f"*{CHECKPOINT_SUFFIX}")}
        own = {path: int(match[1]) for path, match in epochs.items() if match and path.is_file() and not path.is_symlink()}
        return sorted(own, key=lambda path: own[path])


def config_entry(model: nn.Module) -> dict[str, Any]:
    """``config`` for a checkpoint, where the model has one that is a dataclass."""
    config = getattr(model, "config", None)
    return {"config": asdict(config)} if is_dataclass(config) and not isinstance(config, type) else {}


def _content(path: Path) -> dict[str, Any]:
    content = load_plain(path)
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise CheckpointError(f"checkpoint {path} must hold epoch, state_dict, optimizer_states and metrics")
    return content


def _metrics(path: Path) -> dict[str, float]:
    return {name: value for name, value in _content(path)["metrics"].items() if isinstance(value, float)}
