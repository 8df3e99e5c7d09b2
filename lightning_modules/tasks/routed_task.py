"""What every task of routed networks shares: the step, the losses, the optimizer, what a checkpoint says about itself."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, TypedDict, TypeVar, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchmetrics import MeanMetric

from lightning_modules.errors import UserError
from lightning_modules.routed_layers import layer_name
from lightning_modules.tasks.upgrade import upgrade
from trix.nn import ClassifierConfig, FFNConfig, LanguageModelConfig
from trix.outputs import AuxLosses, RoutingInfo

OptimizerCallable = Callable[[Iterable[Any]], Optimizer]
LRSchedulerCallable = Callable[[Optimizer, int], LRScheduler]
Batch = tuple[Tensor, Tensor]
ConfigT = TypeVar("ConfigT", LanguageModelConfig, ClassifierConfig)

CHECKPOINT_KEY = "trix"
CHECKPOINT_VERSION = 2  # 1: before blocks were two sublayers, with other names of weights
_OVERFLOW = "cannot be converted to type"  # what torch says of a number that its floats do not reach


class CheckpointError(UserError, ValueError):
    """A checkpoint cannot be used: it is missing, of another kind, or of another network."""


class StepOutput(TypedDict):
    """What a step returns; callbacks read it as ``outputs`` of on_*_batch_end.

    loss: scalar, nats, with the auxiliary losses in training. routing: RoutingInfo by layer name ("layer_0", ...), detached.
    label: int64, the target of each row of logits: [B] for a classifier, [B, T] for a language model. Where a batch is padded,
    routing and label are those of its N tokens that are not padding, one after the other: [N, ...] and [N].
    """

    loss: Tensor
    routing: dict[str, RoutingInfo]
    label: Tensor


def as_config(kind: type[ConfigT], values: ConfigT | Mapping[str, Any]) -> ConfigT:
    """A network's configuration, from itself or from the nested dicts that a checkpoint stores."""
    if isinstance(values, kind):
        return values
    stored = cast(Mapping[str, Any], values)
    ffn, places = stored.get("ffn", {}), stored.get("attention_at", ())
    return kind(**{**stored, "ffn": FFNConfig(**ffn), "attention_at": tuple(places)})


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
    return LambdaLR(optimizer, lambda step: 0.5 * (1.0 + math.cos(math.pi * min(step / num_steps, 1.0))))


class RoutedTask(L.LightningModule, ABC):
    """loss = cross entropy(network(x), label) + total_aux, for any network that returns logits, routing and losses.

    A batch is (x, label). A subclass makes ``network``, says what else is measured and what a prediction is.

    Logged, in nats per label: ``train/loss`` (the cross entropy alone), ``train/aux_loss``, ``val/loss`` and ``test/loss``
    (means over all labels of the stage, whatever the sizes of the batches).

    Args:
        network: logits, routing, losses = network(x, return_routing=True).
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and the number of training steps, which is the trainer's
            max_steps; stepped after every training step. None keeps the learning rate.
    """

    task_name: ClassVar[str]

    def __init__(self, network: nn.Module, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__()
        self.network = network
        self._make_optimizer = optimizer
        self._make_lr_scheduler = lr_scheduler
        self.mean_loss = MeanMetric(nan_strategy=math.nan)  # what is not a number stays so: by default it would be left out

    def forward(self, x: Tensor) -> Tensor:
        """The logits."""
        return cast(Tensor, self.network(x))

    def training_step(self, batch: Batch) -> StepOutput:
        output, _, aux = self._step(batch)
        # sync_dist: the mean over the processes, whose batches have the same size.
        self.log("train/loss", output["loss"], prog_bar=True, sync_dist=True)
        if aux is not None:
            self.log("train/aux_loss", aux["total_aux"], sync_dist=True)
            output["loss"] = output["loss"] + aux["total_aux"]
        return output

    def validation_step(self, batch: Batch) -> StepOutput:
        return self._evaluation_step(batch)

    def test_step(self, batch: Batch) -> StepOutput:
        return self._evaluation_step(batch)

    @abstractmethod
    def predict_step(self, batch: Batch) -> dict[str, Tensor]: ...

    def on_validation_epoch_start(self) -> None:
        self.reset_metrics()

    def on_test_epoch_start(self) -> None:
        self.reset_metrics()

    def on_validation_epoch_end(self) -> None:
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        self._log_evaluation("test")

    def padding_mask(self, x: Tensor) -> Tensor | None:  # noqa: ARG002
        """bool [B, T], False where a token of the batch is padding; None where none can be."""
        return None

    def update_metrics(self, logits: Tensor, label: Tensor) -> None:
        """Take one batch of an evaluation into account; for metrics beyond the loss."""

    def compute_metrics(self) -> dict[str, Tensor]:
        """The metrics beyond the loss, by name without the stage."""
        return {}

    def reset_metrics(self) -> None:
        self.mean_loss.set_dtype(torch.float32)  # a cast of the network reaches it, and in bfloat16 no sum gets beyond 256
        self.mean_loss.reset()

    def _step(self, batch: Batch) -> tuple[StepOutput, Tensor, AuxLosses | None]:
        x, label = batch
        logits, infos, aux = self.network(x, return_routing=True)
        # In bfloat16 a loss of 4 would be told to the nearest 1/32.
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(exact.reshape(-1, exact.shape[-1]), label.reshape(-1))
        mask_BT = self.padding_mask(x)
        routing = {layer_name(index): _detached(info, mask_BT) for index, info in enumerate(infos)}
        if mask_BT is not None:
            label = label.unsqueeze(1).expand_as(mask_BT)[mask_BT]
        return {"loss": loss, "routing": routing, "label": label}, logits, aux

    def _evaluation_step(self, batch: Batch) -> StepOutput:
        output, logits, _ = self._step(batch)
        self.mean_loss.update(output["loss"], weight=batch[1].numel())
        self.update_metrics(logits, batch[1])
        return output

    def _log_evaluation(self, stage: str) -> None:
        metrics = {"loss": self.mean_loss.compute()} | self.compute_metrics()
        # The metrics have already been reduced over processes.
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, prog_bar=True, rank_zero_only=False)

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

    def check_data(self, datamodule: L.LightningDataModule) -> None:
        """Raise UserError where it can be seen beforehand that the data does not fit the network."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        datamodule: L.LightningDataModule | None = getattr(self.trainer, "datamodule", None)
        checkpoint[CHECKPOINT_KEY] = {
            "task": self.task_name,
            "version": CHECKPOINT_VERSION,
            "data": None if datamodule is None else type(datamodule).__name__,
            "max_steps": self.trainer.max_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        upgrade(checkpoint, checkpoint[CHECKPOINT_KEY])
        if self._trainer is not None and self.trainer.precision == "64-true":
            self.double()  # Lightning does so after it has loaded the weights, which would round them to float32
        if self._trainer is not None and self.trainer.training:
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


def _detached(info: RoutingInfo, mask_BT: Tensor | None) -> RoutingInfo:
    kept: Any = ... if mask_BT is None else mask_BT
    return {
        "tile_idx": info["tile_idx"][kept],
        "weight": info["weight"].detach()[kept],
        "scores": info["scores"].detach()[kept],
    }


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _brief(value: object) -> str:
    return f"{len(value)} characters" if isinstance(value, str) and len(value) > 40 else str(value)
