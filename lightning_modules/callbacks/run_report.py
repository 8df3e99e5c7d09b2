"""What a person at the terminal sees of a run: a few lines at its start, one line a validation, one at its end."""

import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich import get_console
from typing_extensions import override

from lightning_modules.callbacks.last_checkpoint import written_checkpoint
from lightning_modules.callbacks.log_folder import relative_path
from lightning_modules.routed_layers import routed_layers


class RunReport(L.Callback):
    """Print the size of the network and where things are written; then the metrics of each validation; then the best.

    ``trix`` adds it to every ``fit``; it holds no state. Lines go to rich's console, which draws the progress bar too, so the
    two do not disturb each other, and they also serve where there is no terminal.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._has_trained = False

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start = time.monotonic()
        self._has_trained = True
        num_parameters = sum(parameter.numel() for parameter in pl_module.parameters())
        tiles = [layer.num_tiles for layer in routed_layers(pl_module).values()]
        layers = "1 routed layer" if len(tiles) == 1 else f"{len(tiles) or 'no'} routed layers"
        routed = f"{layers} of {_listed(tiles)} tiles" if tiles else layers
        self._print(trainer, f"network      {get_human_readable_count(num_parameters)} parameters, {routed}")
        length = f"{trainer.max_steps} steps" if trainer.max_steps > 0 else f"{trainer.max_epochs} epochs"
        resumed = f", going on after step {trainer.global_step}" if trainer.global_step else ""
        self._print(trainer, f"training     {length} on {trainer.strategy.root_device.type}{resumed}")
        for place in _log_places(trainer):
            self._print(trainer, f"logs         {place}")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        # A task that marks none of them with prog_bar has all of them shown.
        shown = _of_stages(trainer.progress_bar_metrics) or _of_stages(trainer.callback_metrics)
        self._print(trainer, f"step {trainer.global_step:<7} {_metrics_text(shown)}  ({time.monotonic() - self._start:.0f} s)")

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._has_trained:  # Lightning leaves out on_train_start, and says nothing
            end = f"max_steps ({trainer.max_steps})" if trainer.max_steps > 0 else f"max_epochs ({trainer.max_epochs})"
            text = f"nothing left to do: the run is at step {trainer.global_step} and ends at trainer.{end}"
            self._print(trainer, f"training     {text}")
        written = written_checkpoint(trainer)
        if written is not None:
            path, chooser = written
            best_score = None if chooser is None else chooser.best_model_score
            score = "" if chooser is None or best_score is None else f" ({chooser.monitor} {float(best_score):.4f})"
            self._print(trainer, f"checkpoint   {relative_path(path)}{score}")

    def _print(self, trainer: L.Trainer, text: str) -> None:
        if trainer.is_global_zero:
            get_console().print(text, highlight=False, markup=False, soft_wrap=True)


class StepProgressBar(RichProgressBar):
    """Lightning's rich progress bar; a run measured in steps has no number of epochs to show."""

    def _get_train_description(self, current_epoch: int) -> str:
        # Lightning would say "Epoch 0/-2". Should it rename this method, that is what comes back.
        if self.trainer.max_epochs is None or self.trainer.max_epochs > 0:
            return super()._get_train_description(current_epoch)
        return f"{f'Epoch {current_epoch}':{len(self.validation_description)}}"

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


def _of_stages(metrics: Mapping[str, Any]) -> dict[str, float]:
    named = metrics.items()
    return {name: float(value) for name, value in named if name.startswith(("train/", "val/")) and not name.endswith("_step")}


def _metrics_text(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _log_places(trainer: L.Trainer) -> list[str]:
    places = (getattr(logger, "log_dir", None) for logger in trainer.loggers)
    return list(dict.fromkeys(relative_path(place) for place in places if place))


def _listed(numbers: list[int]) -> str:
    return str(numbers[0]) if len(set(numbers)) == 1 else ", ".join(str(number) for number in numbers)
