"""Stop a training that has gone wrong while its weights are still good, and say what to do."""

import math
import statistics
from collections import deque
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.callbacks.last_checkpoint import newest_checkpoint
from lightning_modules.callbacks.log_folder import relative_path
from lightning_modules.errors import UserError

SpikeAction = Literal["warn", "stop"]
SPIKE_ACTIONS: tuple[SpikeAction, ...] = ("warn", "stop")
NUM_NORMS, MIN_NORMS = 50, 20  # norms that the median is taken of
STEPS_BETWEEN_LOOKS = 50  # on a GPU, every look forces a synchronisation


class StabilityMonitor(L.Callback):
    """Log ``train/gradient_norm``; end the run, with a line that says why, where a number is no longer finite.

    Looked at: the loss and the norm of all gradients, before they are clipped and before the step of the optimizer, so that the
    weights stay as they were; the monitored metrics and ``val/loss`` after a validation, before a checkpoint is made of it; the
    parameters, before any checkpoint with the state of the training is written. With 16-bit floats and a gradient scaler, which
    finds its scale by gradients that overflow, the loss alone is looked at.

    A gradient norm above ``spike_factor`` times the median of the last 50 looks is warned of once, or ends the run.

    ``trix`` adds it to every ``fit`` that does not configure one.

    Args:
        every_n_steps: steps between two looks at loss and gradients; None is 1 on a CPU, else 50: the run then ends up to 49
            steps late, still before the next checkpoint.
        spike_factor: > 1; see above. on_spike: "warn" or "stop".

    Raises:
        ValueError: every_n_steps < 1, spike_factor <= 1, or another on_spike. In the run, UserError: as above.

    Example::

        trainer:
          callbacks+:
          - class_path: StabilityMonitor
            init_args: {spike_factor: 10, on_spike: stop}
    """

    def __init__(self, every_n_steps: int | None = None, spike_factor: float = 30.0, on_spike: SpikeAction = "warn") -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps ({every_n_steps}) must be >= 1")
        if not spike_factor > 1.0:
            raise ValueError(f"spike_factor ({spike_factor}) must be > 1")
        if on_spike not in SPIKE_ACTIONS:
            raise ValueError(f"on_spike ({on_spike!r}) must be 'warn' or 'stop'")
        self.every_n_steps, self.spike_factor, self.on_spike = every_n_steps, spike_factor, on_spike
        self._norms: deque[float] = deque(maxlen=NUM_NORMS)
        self._has_warned = False
        self._loss: Tensor | None = None
        self._first_bad_step: Tensor | None = None  # on the device: 0 while all is well

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        # With gradients accumulated, a sum: what is not finite stays so.
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        step = trainer.global_step + 1
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/gradient_norm", norm)  # in other steps it would take as long as the norm, for nothing
        loss, self._loss = norm if self._loss is None else self._loss, None
        watched = loss if getattr(trainer.precision_plugin, "scaler", None) is not None else loss.abs() + norm
        if self._first_bad_step is None:
            self._first_bad_step = torch.zeros((), dtype=torch.int64, device=watched.device)
        is_first = ~watched.isfinite() & (self._first_bad_step == 0)
        self._first_bad_step = self._first_bad_step.masked_fill(is_first, step)
        if step % (self.every_n_steps or (1 if watched.device.type == "cpu" else STEPS_BETWEEN_LOOKS)) == 0:
            self._look(trainer, pl_module, loss)
            self._look_for_spike(trainer, pl_module, float(norm), step)

    def _look(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor | None = None) -> None:
        """Raise UserError if a step since the last look was bad; with several processes, if it was so in any of them."""
        step = 0 if self._first_bad_step is None else int(self._first_bad_step)
        if trainer.strategy.reduce_boolean_decision(step > 0, all=False):
            raise UserError(f"{_problem(trainer, pl_module, step, loss)}; {_remedy(trainer)}")

    def _look_for_spike(self, trainer: L.Trainer, pl_module: L.LightningModule, norm: float, step: int) -> None:
        if not math.isfinite(norm):  # the gradient scaler skips the step
            return
        median = statistics.median(self._norms) if len(self._norms) >= MIN_NORMS else math.inf
        self._norms.append(norm)
        if norm <= self.spike_factor * median or (self._has_warned and self.on_spike == "warn"):
            return
        _, largest = max((float(gradient.norm()), name) for name, gradient in _gradients(pl_module).items())
        text = (
            f"the gradient norm of step {step} ({norm:.3g}) must be <= spike_factor ({self.spike_factor:g}) * "
            f"the median of the steps before ({median:.3g}); it is largest in {largest}; {_remedy(trainer)}"
        )
        if self.on_spike == "stop":
            raise UserError(text)
        self._has_warned = True
        rank_zero_warn(text)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        monitored = {getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks}
        for name, value in trainer.callback_metrics.items():
            if name in monitored | {"val/loss"} and not value.isfinite():
                raise UserError(f"{name} after step {trainer.global_step} ({float(value)}) must be finite; {_remedy(trainer)}")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer, pl_module)
        name = _first_bad(dict(pl_module.named_parameters()))
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            where = name or "the parameters"
            raise UserError(f"{where} after step {trainer.global_step} must be finite to be saved; {_remedy(trainer)}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "has_warned": self._has_warned}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._norms.extend(state_dict["norms"])
        self._has_warned = state_dict["has_warned"]


def _problem(trainer: L.Trainer, pl_module: L.LightningModule, step: int, loss: Tensor | None) -> str:
    """What is not finite: the loss, and which part of it; or the gradients, and where first."""
    if loss is None or not loss.isfinite():
        parts = [
            f"{name} {float(value):.3g}"
            for name, value in trainer.callback_metrics.items()
            if name.startswith("train/") and "loss" in name
        ]
        text = f"the loss of step {step} ({'not finite' if loss is None else float(loss)}) must be finite: {', '.join(parts)}"
        name = _first_bad(dict(pl_module.named_parameters()))
        return text if name is None else f"{text}, with {name} not finite either"
    gradients = _gradients(pl_module)
    return f"the gradient of step {step} must be finite: it is not in {_first_bad(gradients)}"


def _gradients(pl_module: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.grad for name, value in pl_module.named_parameters() if value.grad is not None}


def _first_bad(tensors: dict[str, Any]) -> str | None:
    return next((name for name, value in tensors.items() if not value.isfinite().all()), None)


def _remedy(trainer: L.Trainer) -> str:
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    verb = "set" if trainer.gradient_clip_val is None else "lower"
    advice = f"lower model.optimizer.lr (now {rate:.3g}) or {verb} trainer.gradient_clip_val ({trainer.gradient_clip_val})"
    good = newest_checkpoint(trainer)
    place = "no checkpoint has been written" if good is None else f"the last good checkpoint is {relative_path(good)}"
    return f"{advice}; {place}"
