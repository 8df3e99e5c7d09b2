"""What every task shares: the network, its optimizer and schedule, what a checkpoint says of itself, what commands ask."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, cast

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lightning_modules.class_paths import class_path
from lightning_modules.data.data_module import RunData
from lightning_modules.errors import UserError
from lightning_modules.tasks.answers import Example, Exporter, Page, Request, default_example, default_exporter, default_page
from lightning_modules.tasks.cut_epoch import settle_epoch
from lightning_modules.tasks.upgrade import upgrade

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer, int], LRScheduler]

CHECKPOINT_KEY = "trix"
CHECKPOINT_VERSION = 2  # 1: before blocks were two sublayers, with other names of weights
# Parameters of a task that are filled with the data's attribute of the same name, where the data has one.
FROM_DATA = ("vocabulary", "num_features", "num_classes", "class_names")
_OVERFLOW = "cannot be converted to type"  # what torch says of a number that its floats do not reach


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be used: it is missing, of another kind, or of another network."""


def check_eps(optimizer: Optimizer, precision: str | None) -> None:
    """Raise UserError where the optimizer's eps is 0 in the floats of the parameters, so that it would divide by 0."""
    if precision != "16-true":
        return
    smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
    for group in optimizer.param_groups:
        if group.get("eps", 1.0) < smallest:
            raise UserError(
                f"model.optimizer.eps ({group['eps']:g}) must be >= {smallest:.1g} with trainer.precision 16-true: 0.001 is "
                "usual there, and bf16-true needs no change"
            )


def default_lr_scheduler(optimizer: Optimizer, num_steps: int) -> LRScheduler:
    """Half a cosine, from the full rate to 0 after num_steps; a run resumed with more steps goes on along the longer one."""
    return LambdaLR(optimizer, lambda step: half_cosine(step, num_steps))


def half_cosine(step: int, num_steps: int) -> float:
    """1 at step 0, 0 from num_steps on."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0)))


class TrixTask(L.LightningModule, ABC):
    """A LightningModule that `trix` can train, resume, measure, read and export: the base class of a task of your own.

    A subclass has the steps of any LightningModule; :class:`~lightning_modules.tasks.RoutedTask` has them already. It saves
    what its ``__init__`` needs with ``self.save_hyperparameters({...})``, as plain values: with them alone a checkpoint
    rebuilds it. Parameters named as in ``FROM_DATA`` are filled from the data, where it has such an attribute.

    Args:
        network: answers the inputs of a batch.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and the number of training steps, which is the trainer's
            max_steps; stepped after every training step. None keeps the learning rate.

    Attributes:
        task_name: what checkpoints call the task; by default that of the class it derives from, else the name of the class.
        reports_routing: whether each step returns a :class:`~lightning_modules.tasks.StepOutput`, which some callbacks read.
    """

    task_name: ClassVar[str] = ""
    reports_routing: ClassVar[bool] = False

    def __init_subclass__(cls, is_base: bool = False, **settings: Any) -> None:
        """is_base: the class is there to be derived from, and leaves it to those to have a name."""
        super().__init_subclass__(**settings)
        if not cls.task_name and not is_base:
            cls.task_name = cls.__name__

    def __init__(self, network: nn.Module, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.network = network
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler

    @abstractmethod
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As in Lightning.

        It is abstract for the parser's sake, which would take the ``network`` of this class, none, for a subclass's default.
        """

    def forward(self, x: Tensor) -> Tensor:
        """The network's answer."""
        return cast(Tensor, self.network(x))

    def example(self, data: RunData, request: Request) -> Example:
        """What ``trix why`` explains; by default one example of the validation data.

        Raises:
            UserError: the request names none.
        """
        return default_example(type(self).__name__, self.network, data, request)

    def page(self, data: RunData, num_tokens: int) -> Page:
        """What ``trix inspect`` and the report at the end of a run show; by default held-out data, whatever it is.

        Args:
            num_tokens: largest number of tokens shown; at least one example is.
        """
        return default_page(self.network, data, num_tokens, getattr(self, "class_names", None))

    def exportable(self, data: RunData, num_tokens: int) -> Exporter:
        """What writes the ONNX file of ``trix export``; by default the network with any number of examples at a time.

        Args:
            num_tokens: largest number of held-out tokens compared with torch; at least one example is.
        """
        return default_exporter(self.network, data, num_tokens)

    @classmethod
    def check_sizes(cls, settings: Mapping[str, Any], state_dict: Mapping[str, Any]) -> None:
        """Raise CheckpointError where hyperparameters of a checkpoint name more parts than its weights have.

        It is asked before anything is made with them. Sizes of tensors need no check: they are compared with the weights
        before any memory is taken.
        """

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Raise UserError where it can be seen beforehand that the data does not fit the network."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # Not trainer.estimated_stepping_batches: asking for it makes the loaders, and a resumed run loses its place in them.
        optimizer, scheduler = self.make_optimizer(self.trainer.max_steps)
        check_eps(optimizer, self.trainer.precision)
        if scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def optimizer_step(self, *args: Any, **settings: Any) -> None:
        """Raise UserError where the step itself is beyond the range of the parameters' floats, which torch refuses."""
        try:
            super().optimizer_step(*args, **settings)
        except RuntimeError as error:
            if _OVERFLOW not in str(error):
                raise
            rate = self.trainer.optimizers[0].param_groups[0]["lr"]
            raise UserError(
                f"the optimizer's step {self.global_step + 1} must be finite: lower model.optimizer.lr (now {rate:.3g}) "
                f"or what else it multiplies by ({error})"
            ) from error

    def make_optimizer(self, num_steps: int) -> tuple[Optimizer, LRScheduler | None]:
        """A new optimizer, and its schedule over num_steps.

        Raises:
            UserError: num_steps < 1 with a schedule; and what the optimizer says of its settings.
        """
        optimizer = self._make_optimizer(self.parameters())
        if self._make_lr_scheduler is None:
            return optimizer, None
        if num_steps < 1:
            raise UserError(
                f"trainer.max_steps ({num_steps}) must be >= 1: the learning rate schedule spans that many steps "
                "(lr_scheduler: null does without one)"
            )
        return optimizer, self._make_lr_scheduler(optimizer, num_steps)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        datamodule: L.LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        checkpoint.setdefault("hyper_parameters", {})  # Lightning leaves out what is empty
        checkpoint[CHECKPOINT_KEY] = {
            "task": self.task_name,
            "version": CHECKPOINT_VERSION,
            "data": None if datamodule is None else type(datamodule).__name__,
            "max_steps": self.trainer.max_steps,
            "task_class": class_path(type(self)),
            "data_class": None if datamodule is None else class_path(type(datamodule)),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        upgrade(checkpoint, checkpoint[CHECKPOINT_KEY])
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning does so after it has loaded the weights, which would round them to float32
        if self._trainer is not None and self.trainer.training:
            settle_epoch(checkpoint)
            stored, now = checkpoint[CHECKPOINT_KEY].get("max_steps"), self.trainer.max_steps
            if stored != now and self._make_lr_scheduler is not None:
                is_stretched = self._make_lr_scheduler is default_lr_scheduler
                what = f"schedule now spans {now} steps" if is_stretched else f"schedule may still span {stored} steps"
                rank_zero_warn(
                    f"trainer.max_steps ({now}) differs from the checkpoint's ({stored}): the learning rate's {what}"
                )

    def check_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Raise CheckpointError, in one line, unless the checkpoint is of this task with these hyperparameters."""
        entry = checkpoint.get(CHECKPOINT_KEY)
        if not isinstance(entry, dict) or "task" not in entry:
            raise CheckpointError("the checkpoint was not written by trix")
        if entry["task"] != self.task_name:
            raise CheckpointError(f"task ({self.task_name}) must equal the checkpoint's ({entry['task']})")
        own_class = class_path(type(self))  # a class derived from another task has its name
        if entry.get("task_class", own_class) != own_class:
            raise CheckpointError(f"class of the task ({own_class}) must equal the checkpoint's ({entry['task_class']!s:.80})")
        stored, now = _flat(checkpoint.get("hyper_parameters", {})), _flat(self.hparams)
        for name, value in now.items():
            if name in stored and stored[name] != value:
                raise CheckpointError(f"{name} ({_brief(value)}) must equal the checkpoint's ({_brief(stored[name])})")

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As nn.Module's, with the first difference in one line.

        Raises:
            CheckpointError: a key is missing or unexpected, or a value is none that its module takes.
        """
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except Exception as error:  # modules read what they kept in ways of their own
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            reason = lines[1] if len(lines) > 1 else lines[0]
            reason = reason if len(reason) <= 300 else reason[:300] + "..."
            raise CheckpointError(f"the checkpoint's weights do not fit the network: {reason}") from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted names; the arguments of a part (``mixer_args``) are one value, which an argument left out changes."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and not name.endswith("_args"):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _brief(value: object) -> str:
    return f"{len(value)} characters" if isinstance(value, str) and len(value) > 40 else str(value)
