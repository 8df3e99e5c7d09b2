"""Undo a training step that has gone wrong, leave its batch out, and go on."""

import functools
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_modules.callbacks.last_checkpoint import newest_checkpoint
from lightning_modules.callbacks.stability import (
    FAILURE_TYPES,
    NUM_NORMS,
    FailureType,
    as_failure_type,
    gradient_norm,
    not_finite,
    remedy,
    usual,
)
from lightning_modules.callbacks.training_state import TrainingState
from lightning_modules.errors import UserError
from lightning_modules.learning_rates import scale_rates
from lightning_modules.tasks.checkpoint_file import load_plain
from lightning_modules.tasks.task import CheckpointError
from lightning_modules.whole_files import CHECKPOINT_SUFFIX

Failure = tuple[FailureType, str]  # and what to say of it

RATE_FACTOR = 0.5
_NO_MEMORY = (torch.OutOfMemoryError, MemoryError)
_NO_CPU_MEMORY = ("can't allocate memory", "not enough memory")  # what torch says in a RuntimeError
_RULES: dict[FailureType, str] = {
    "nan_detected": "must not be NaN",
    "inf_detected": "must be finite",
    "loss_spike": "must be <= loss_spike_factor ({factor:g}) * the median of the losses before ({median:.3g})",
    "gradient_explosion": "must be <= gradient_spike_factor ({factor:g}) * the median of the norms before ({median:.3g})",
}


class AutoRecovery(L.Callback):
    """Undo a step that has gone wrong, leave its batch out, halve the learning rate, and go on: at most max_retries times.

    What goes wrong: a loss, a gradient or, after the optimizer's step, a weight that is NaN or infinite; a loss, or a norm of
    all gradients before they are clipped, above its factor times the median of the last 50 (from the 20th step on); memory that
    runs out in training_step or backward. Parameters, buffers, the optimizer, its schedule, the gradient scaler and the random
    numbers are then as they were before the batch. For that they are copied before each batch, which takes as much memory
    again, and every step waits for the loss and the norm. The batch still counts as a step of the trainer and of the schedule.

    When memory has run out the learning rate stays. The batch was too large; weights and gradients are sound. A smaller rate
    would make no room, and since nothing raises it again, three such batches would leave an eighth of it for the rest.

    A spike or an explosion in the very step after a recovery says that what was put back is bad itself. Then weights and
    optimizer are those of the newest checkpoint in checkpoint_dir, where there is one that fits.

    With accumulated gradients a bad gradient leaves out all batches of its step, a bad loss its own batch. With several
    processes all of them leave out their batches, and memory that runs out ends the run, as the others would wait forever.
    With a gradient scaler, infinite gradients are left to it. A failure beyond max_retries, which resumed runs go on counting,
    ends the run as :class:`StabilityMonitor` would. A run that is killed goes on with ``trix fit --resume``, as any other.

    Args:
        checkpoint_dir: folder whose newest checkpoint (\\*.ckpt) is gone back to; None: the run's own checkpoints.
        max_retries: number of recoveries in a run, >= 0. loss_spike_factor, gradient_spike_factor: multiples of the medians
            that a loss and a norm may reach, > 1.

    Raises:
        ValueError: arguments out of range. In the run, UserError: one failure too many, or a module that optimizes by hand.

    Example::

        trainer:
          callbacks+:
          - class_path: AutoRecovery
            init_args: {max_retries: 5, loss_spike_factor: 4}
    """

    recovers = True  # StabilityMonitor leaves bad steps to such a callback

    def __init__(
        self,
        checkpoint_dir: str | None = None,
        max_retries: int = 3,
        *,
        loss_spike_factor: float = 3.0,
        gradient_spike_factor: float = 30.0,
    ) -> None:
        if max_retries < 0:
            raise ValueError(f"max_retries ({max_retries}) must be >= 0")
        for name, factor in {"loss": loss_spike_factor, "gradient": gradient_spike_factor}.items():
            if not factor > 1.0:
                raise ValueError(f"{name}_spike_factor ({factor}) must be > 1")
        self.checkpoint_dir, self.max_retries = checkpoint_dir, max_retries
        self.num_recoveries = 0
        self._factors = {"loss": loss_spike_factor, "gradient_norm": gradient_spike_factor}
        self._seen: dict[str, deque[float]] = {name: deque(maxlen=NUM_NORMS) for name in self._factors}
        self._trainer: L.Trainer | None = None
        self._state: TrainingState | None = None
        self._last_recovered_step = -1
        self._pending: Failure | None = None  # found where the step cannot be left yet
        self._hooks: list[RemovableHandle] = []

    def detect_failure(self, state: Mapping[str, Any]) -> FailureType | None:
        """What is wrong with a training step, or None; ``loss`` and ``gradient_norm`` of a good one join the history.

        Args:
            state: ``loss`` and ``gradient_norm``, tensors or numbers, are compared with those before; ``error``, an exception,
                may be that the memory has run out; whatever else is looked at for NaN and infinity.
        """
        if _is_out_of_memory(state.get("error")):
            return "out_of_memory"
        failure = not_finite(state)
        if failure is not None:
            return failure
        values = {name: float(state[name]) for name in self._factors if state.get(name) is not None}
        for name, value in values.items():
            if value > self._factors[name] * abs(usual(self._seen[name])):
                return "loss_spike" if name == "loss" else "gradient_explosion"
        for name, value in values.items():
            self._seen[name].append(value)
        return None

    def recover(self, failure_type: str, model: nn.Module, optimizer: Optimizer) -> bool:
        """Put back the last good state and, unless memory has run out, halve the learning rate; False once that is too often,
        or if there is none.

        In a training it is the state before the batch at hand, else the newest checkpoint in checkpoint_dir that fits.

        Raises:
            ValueError: failure_type is unknown.
        """
        failure = as_failure_type(failure_type)
        if self.num_recoveries >= self.max_retries:
            return False
        has_state = self._state is not None
        if self._state is not None:
            self._state.restore()
            self._state = None
        step = -1 if self._trainer is None else self._trainer.global_step
        is_again = failure in ("loss_spike", "gradient_explosion") and step == self._last_recovered_step + 1
        if (not has_state or is_again) and not self._load_newest(model, optimizer) and not has_state:
            return False
        if failure != "out_of_memory":
            configs = [] if self._trainer is None else self._trainer.lr_scheduler_configs
            schedulers = [config.scheduler for config in configs if isinstance(config.scheduler, LRScheduler)]
            scale_rates(optimizer, schedulers, RATE_FACTOR)
        self.num_recoveries += 1
        self._last_recovered_step = step
        return True

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not pl_module.automatic_optimization:
            raise UserError(f"automatic_optimization of {type(pl_module).__name__} (False) must be True with AutoRecovery")
        self._trainer = trainer
        # No hook lets a callback answer an exception, so the two methods that may raise it are wrapped.
        pl_module.training_step = self._guarded_step(trainer, pl_module)  # type: ignore[method-assign]
        pl_module.backward = self._guarded_backward(pl_module)  # type: ignore[method-assign]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        def look(optimizer: Optimizer, *_: Any) -> None:
            self._look_at_weights(trainer, pl_module, optimizer)

        # Unlike on_train_batch_end, before the schedule goes on.
        self._hooks = [optimizer.register_step_post_hook(look) for optimizer in trainer.optimizers]

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go(pl_module)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._let_go(pl_module)

    def _let_go(self, pl_module: L.LightningModule) -> None:
        for name in ("training_step", "backward"):
            pl_module.__dict__.pop(name, None)
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._trainer = self._state = self._pending = None

    def _guarded_step(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        training_step = pl_module.training_step

        @functools.wraps(training_step)
        def step(*args: Any, **settings: Any) -> Any:
            self._state = TrainingState(trainer, pl_module)
            output: Any = None
            failure: Failure | None
            try:
                output = training_step(*args, **settings)
            except Exception as error:
                failure = self._failure_of_memory(trainer, error)
            else:
                failure = self._failure_of_loss(trainer, output)
            if failure is None:
                return output
            if trainer.world_size > 1:  # where each process has to come to the same gradients
                self._pending = failure
                return output
            self._recover(failure, trainer, pl_module, trainer.optimizers[0])
            self._state = TrainingState(trainer, pl_module)  # gradients of other batches may go into this step
            return None  # Lightning goes on with the next batch

        return step

    def _guarded_backward(self, pl_module: L.LightningModule) -> Any:
        backward = pl_module.backward

        @functools.wraps(backward)
        def guarded(*args: Any, **settings: Any) -> None:
            try:
                backward(*args, **settings)
            except Exception as error:
                self._pending = self._failure_of_memory(pl_module.trainer, error)

        return guarded

    def _failure_of_memory(self, trainer: L.Trainer, error: Exception) -> Failure:
        """What to say of memory that has run out; every other error is raised, and this one where it cannot be answered."""
        is_last = self.num_recoveries >= self.max_retries or trainer.world_size > 1
        if not _is_out_of_memory(error) or is_last:
            raise error
        error.__traceback__ = None  # its frames hold the tensors of the step
        return "out_of_memory", f"the memory must suffice for step {trainer.global_step + 1} ({_first_line(error)})"

    def _failure_of_loss(self, trainer: L.Trainer, output: Any) -> Failure | None:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        return self._failure_of(trainer, "loss", float(loss.detach())) if isinstance(loss, Tensor) else None

    def _failure_of(self, trainer: L.Trainer, name: str, value: float) -> Failure | None:
        """What is wrong with a loss or a norm of this step, if anything is."""
        median = usual(self._seen[name])
        failure = self.detect_failure({name: value})
        if failure is None:
            return None
        rule = _RULES[failure].format(factor=self._factors[name], median=median)
        return failure, f"the {name.replace('_', ' ')} of step {trainer.global_step + 1} ({value:.3g}) {rule}"

    @override
    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        failure, self._pending = self._pending, None
        has_gradients = any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
        if failure is None and has_gradients:
            norm = float(gradient_norm(optimizer))
            has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
            if math.isfinite(norm) or not has_scaler:
                failure = self._failure_of(trainer, "gradient_norm", norm)
        failure = _of_all_processes(trainer, failure)
        if failure is not None:
            self._recover(failure, trainer, pl_module, optimizer)
            optimizer.zero_grad(set_to_none=True)  # the optimizer passes over parameters without a gradient

    def _look_at_weights(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        if self._state is None:  # this step has been undone already
            return
        parameters = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
        if torch.nn.utils.get_total_norm(parameters).isfinite():
            return
        largest = torch.nn.utils.get_total_norm(parameters, norm_type=math.inf)  # slower, but no sum of squares that overflows
        failure = not_finite(largest)
        if failure is not None:
            text = f"the weights after step {trainer.global_step + 1} ({float(largest)}) {_RULES[failure]}"
            self._recover((failure, text), trainer, pl_module, optimizer)

    def _recover(self, found: Failure, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Undo the step; raise UserError where it is one too many."""
        failure, text = found
        if not self.recover(failure, pl_module, optimizer):
            if self._state is not None:
                self._state.restore()
            count = f"recoveries ({self.num_recoveries + 1}) must be <= max_retries ({self.max_retries})"
            raise UserError(f"{text}; {count}; {remedy(trainer)}")
        if failure == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        rate = optimizer.param_groups[0]["lr"]
        rank_zero_warn(
            f"{text}: its batch is left out, and the run goes on from the state before it with a learning rate of {rate:.3g} "
            f"(recovery {self.num_recoveries} of {self.max_retries})"
        )

    def _load_newest(self, model: nn.Module, optimizer: Optimizer) -> bool:
        """Take weights and optimizer, excluding its learning rates, from the newest checkpoint; False where none fits."""
        if self.checkpoint_dir is not None:
            paths = [path for path in Path(self.checkpoint_dir).glob(f"*{CHECKPOINT_SUFFIX}") if path.is_file()]
            path = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
        else:
            path = None if self._trainer is None else newest_checkpoint(self._trainer)
        if path is None:
            return False
        try:
            checkpoint = load_plain(path)
            weights, (state,) = checkpoint["state_dict"], checkpoint["optimizer_states"]
            now = model.state_dict()
            shapes = [{name: getattr(value, "shape", None) for name, value in each.items()} for each in (now, weights)]
            if shapes[0] != shapes[1] or not_finite(list(weights.values())) is not None:
                return False
            kept = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state)
        except (CheckpointError, KeyError, TypeError, ValueError, AttributeError):  # another run's, or nobody's
            return False
        for group, settings in zip(optimizer.param_groups, kept, strict=True):
            group.update(settings)
        model.load_state_dict(weights)
        return True

    @override
    def state_dict(self) -> dict[str, Any]:
        counts = {"num_recoveries": self.num_recoveries, "last_recovered_step": self._last_recovered_step}
        return counts | {name: list(values) for name, values in self._seen.items()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_recoveries, self._last_recovered_step = state_dict["num_recoveries"], state_dict["last_recovered_step"]
        for name, values in self._seen.items():
            values.extend(state_dict[name])


def _of_all_processes(trainer: L.Trainer, failure: Failure | None) -> Failure | None:
    """With several processes: where one of them has found a failure, all have."""
    if trainer.world_size == 1:
        return failure
    own = 0 if failure is None else 1 + FAILURE_TYPES.index(failure[0])
    worst = int(trainer.strategy.reduce(torch.tensor(own, device=trainer.strategy.root_device), reduce_op="max"))
    if worst and failure is None:
        return FAILURE_TYPES[worst - 1], f"step {trainer.global_step + 1} must go well in every process"
    return failure


def _is_out_of_memory(error: object) -> bool:
    is_cpu = isinstance(error, RuntimeError) and any(text in str(error) for text in _NO_CPU_MEMORY)
    return isinstance(error, _NO_MEMORY) or is_cpu


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 120 else lines[0][:117] + "..."
