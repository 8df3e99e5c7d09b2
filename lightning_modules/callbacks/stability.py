"""Stop a training that has gone wrong while its weights are still good, and say what to do."""

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.callbacks.last_checkpoint import newest_checkpoint
from lightning_modules.callbacks.log_folder import relative_path
from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError
from trix.resnet_bk.kernel import free_resolvent

SpikeAction = Literal["warn", "stop"]
SPIKE_ACTIONS: tuple[SpikeAction, ...] = ("warn", "stop")
NUM_NORMS, MIN_NORMS = 50, 20  # norms that the median is taken of
STEPS_BETWEEN_LOOKS = 50  # on a GPU, every look forces a synchronisation

FailureType = Literal["nan_detected", "inf_detected", "loss_spike", "gradient_explosion", "out_of_memory"]
FAILURE_TYPES: tuple[FailureType, ...] = get_args(FailureType)
_ADVICE: dict[FailureType, str] = {
    "nan_detected": "go back to the last good checkpoint, leave the batch out and halve the learning rate; then look for a "
    "division by 0, or a logarithm or a root of a negative number",
    "inf_detected": "go back to the last good checkpoint, leave the batch out and halve the learning rate; with 16-bit floats "
    "use bf16 or a gradient scaler",
    "loss_spike": "go back to the last good checkpoint, leave the batch out and halve the learning rate",
    "gradient_explosion": "leave the batch out, halve the learning rate and clip the norm of the gradients",
    "out_of_memory": "leave the batch out; then halve the batch size and accumulate gradients over twice as many batches, or "
    "recompute activations (gradient checkpointing)",
}
ROUNDING = 1e-6  # relative, of norms in float32


class StabilityMonitor(L.Callback):
    """Log ``train/gradient_norm``; end the run, with a line that says why, where a number is no longer finite.

    Looked at: the loss and the norm of all gradients, before they are clipped and before the step of the optimizer, so that the
    weights stay as they were; the monitored metrics and ``val/loss`` after a validation, before a checkpoint is made of it; the
    parameters, before any checkpoint with the state of the training is written. With 16-bit floats and a gradient scaler, which
    finds its scale by gradients that overflow, the loss alone is looked at.

    A gradient norm above ``spike_factor`` times the median of the last 50 looks is warned of once, or ends the run.

    ``trix`` adds it to every ``fit`` that does not configure one. Next to an :class:`AutoRecovery` it leaves bad steps to that
    one, and still keeps what is not finite out of checkpoints.

    The ``check_*`` methods and :meth:`suggest_recovery` need no training: they answer about what they are given.

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
        norm = gradient_norm(optimizer)
        step = trainer.global_step + 1
        if trainer.log_every_n_steps and step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            pl_module.log("train/gradient_norm", norm)  # in other steps it would take as long as the norm, for nothing
        loss, self._loss = norm if self._loss is None else self._loss, None
        if any(getattr(callback, "recovers", False) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            return
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
            raise UserError(f"{_problem(trainer, pl_module, step, loss)}; {remedy(trainer)}")

    def _look_for_spike(self, trainer: L.Trainer, pl_module: L.LightningModule, norm: float, step: int) -> None:
        if not math.isfinite(norm):  # the gradient scaler skips the step
            return
        median = usual(self._norms)
        self._norms.append(norm)
        if norm <= self.spike_factor * median or (self._has_warned and self.on_spike == "warn"):
            return
        _, largest = max((float(gradient.norm()), name) for name, gradient in _gradients(pl_module).items())
        text = (
            f"the gradient norm of step {step} ({norm:.3g}) must be <= spike_factor ({self.spike_factor:g}) * "
            f"the median of the steps before ({median:.3g}); it is largest in {largest}; {remedy(trainer)}"
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
                raise UserError(f"{name} after step {trainer.global_step} ({float(value)}) must be finite; {remedy(trainer)}")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._look(trainer, pl_module)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._look(trainer, pl_module)
        name = _first_bad(dict(pl_module.named_parameters()))
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):
            where = name or "the parameters"
            raise UserError(f"{where} after step {trainer.global_step} must be finite to be saved; {remedy(trainer)}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms), "has_warned": self._has_warned}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._norms.extend(state_dict["norms"])
        self._has_warned = state_dict["has_warned"]

    def check_tensors(self, tensors: Mapping[str, Any]) -> dict[str, bool]:
        """By name, whether a tensor holds neither NaN nor infinity; ``all_finite``: whether none of them does.

        Args:
            tensors: tensors or numbers, or nested lists and dicts of them; what is None counts as finite.
        """
        health = {name: not_finite(value) is None for name, value in tensors.items()}
        return health | {"all_finite": all(health.values())}

    def check_condition_number(self, H: Tensor) -> float:
        """kappa(H) = sigma_max / sigma_min of a matrix, in float64; infinite where H is singular, NaN where it is not finite.

        Raises:
            ValueError: H is no matrix of at least one row and column.
        """
        if H.ndim != 2 or 0 in H.shape:
            raise ValueError(f"shape of H ({tuple(H.shape)}) must be [rows, columns], both >= 1")
        if not H.isfinite().all():
            return math.nan
        sigma = torch.linalg.svdvals(_exact(H))
        return float(sigma[0] / sigma[-1]) if sigma[-1] > 0 else math.inf

    def check_schatten_bounds(self, K: Tensor, epsilon: float, z: complex) -> bool:
        """Whether K = |V|^(1/2) R0(z) sgn(V) |V|^(1/2) keeps two bounds, with eta = Im z.

        |K|_S2 <= |V|_2 sqrt(max_i Im R0_ii / eta) and |K|_S1 <= |V|_1 / eta. They hold for every real potential V on a lattice
        whose free operator has 1 next to its diagonal and 0 elsewhere, so a K that breaks them has been computed wrongly. V is
        read from the diagonal, K_ii = V_i R0_ii(z). Not checked are the bounds |V|_2 / (2 sqrt(eta)) and |V|_1 / (2 eta), which
        are sometimes claimed: they are false.

        Args:
            K: [n, n], real or complex. epsilon: > 0, the width that V has been smoothed with; the bounds hold for each.
            z: Im z > 0.

        Raises:
            ValueError: K is not square, or epsilon or Im z is not positive.
        """
        if K.ndim != 2 or K.shape[0] != K.shape[1] or not len(K):
            raise ValueError(f"shape of K ({tuple(K.shape)}) must be [n, n], n >= 1")
        if not epsilon > 0:
            raise ValueError(f"epsilon ({epsilon}) must be > 0")
        if not z.imag > 0:
            raise ValueError(f"Im z ({z.imag}) must be > 0")
        if not K.isfinite().all():
            return False
        free = free_resolvent(len(K), z).diagonal().to(K.device)
        v, sigma = (K.diagonal() / free).abs(), torch.linalg.svdvals(_exact(K))
        largest = 1.0 + ROUNDING
        keeps_second = sigma.norm() <= largest * v.norm() * (free.imag.max() / z.imag).sqrt()
        return bool(keeps_second and sigma.sum() <= largest * v.sum() / z.imag)

    def suggest_recovery(self, failure_type: str) -> str:
        """What to do about a failure, in a sentence.

        Raises:
            ValueError: the failure is none of ``FAILURE_TYPES``.
        """
        return _ADVICE[as_failure_type(failure_type)]


def as_failure_type(name: str) -> FailureType:
    """The name itself; ValueError where it is none of ``FAILURE_TYPES``."""
    for known in FAILURE_TYPES:
        if name == known:
            return known
    raise ValueError(
        f"failure_type ({name!r}) must be one of {', '.join(FAILURE_TYPES)}{did_you_mean(str(name), FAILURE_TYPES, cutoff=0.3)}"
    )


def not_finite(value: Any) -> Literal["nan_detected", "inf_detected"] | None:
    """What is in a tensor, a number, or nested lists and dicts of them, NaN before infinity; None where all is finite."""
    if isinstance(value, Mapping | list | tuple):
        found = {not_finite(one) for one in (value.values() if isinstance(value, Mapping) else value)}
        return "nan_detected" if "nan_detected" in found else "inf_detected" if "inf_detected" in found else None
    if isinstance(value, Tensor):
        if value.isfinite().all():
            return None
        return "nan_detected" if value.isnan().any() else "inf_detected"
    if not isinstance(value, int | float | complex) or (abs(value) < math.inf):
        return None
    return "nan_detected" if value != value else "inf_detected"


def usual(history: Sequence[float]) -> float:
    """The median of what has been seen; infinite while that says nothing: there is too little, or most of it is 0."""
    return (statistics.median(history) or math.inf) if len(history) >= MIN_NORMS else math.inf


def gradient_norm(optimizer: Optimizer) -> Tensor:
    """The norm of all gradients that the optimizer is about to step along."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])


def _exact(matrix: Tensor) -> Tensor:
    return matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)


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


def remedy(trainer: L.Trainer) -> str:
    """What the user can do about a step that has gone wrong, and where the last good checkpoint is."""
    rate = trainer.optimizers[0].param_groups[0]["lr"]
    verb = "set" if trainer.gradient_clip_val is None else "lower"
    advice = f"lower model.optimizer.lr (now {rate:.3g}) or {verb} trainer.gradient_clip_val ({trainer.gradient_clip_val})"
    good = newest_checkpoint(trainer)
    place = "no checkpoint has been written" if good is None else f"the last good checkpoint is {relative_path(good)}"
    return f"{advice}; {place}"
