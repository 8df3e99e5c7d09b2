"""What every task of routed networks shares: the steps and the losses."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_modules.learning_rates import share_of_peak
from lightning_modules.routed_layers import layer_name, routed_layers
from lightning_modules.tasks.hub import HubTask
from lightning_modules.tasks.task import LRSchedulerCallable, OptimizerCallable
from trix.nn import ClassifierConfig, FFNConfig, LanguageModelConfig
from trix.outputs import AuxLosses, RoutingInfo

Batch = tuple[Tensor, Tensor]
ConfigT = TypeVar("ConfigT", LanguageModelConfig, ClassifierConfig)


class StepOutput(TypedDict):
    """What a step returns; callbacks read it as ``outputs`` of on_*_batch_end.

    loss: scalar, nats, with the auxiliary losses in training. routing: RoutingInfo by layer name ("layer_0", ...), detached.
    label: the target of each row of logits, int64 where it is a class: [B] for a classifier, [B, T] for a language model. Where
    a batch is padded, routing and label are those of its N tokens that are not padding, one after the other: [N, ...] and [N].
    """

    loss: Tensor
    routing: dict[str, RoutingInfo]
    label: Tensor


def as_config(kind: type[ConfigT], values: ConfigT | Mapping[str, Any]) -> ConfigT:
    """A network's configuration, from itself or from the nested dicts that a checkpoint stores."""
    if isinstance(values, kind):
        return values
    stored = cast(Mapping[str, Any], values)
    ffn = {"ffn": FFNConfig(**stored["ffn"])} if "ffn" in stored else {}  # each kind has a default of its own
    return kind(**{**stored, **ffn, "attention_at": tuple(stored.get("attention_at", ()))})


class RoutedTask(HubTask, is_base=True):
    """loss = cross entropy(network(x), label) + total_aux, for any network that returns logits, routing and losses.

    A batch is (x, label). A subclass makes ``network``, says what else is measured and what a prediction is; one that learns
    something else than classes has a :meth:`loss` of its own.

    Logged, in nats per label (or the unit of the loss): ``train/loss`` (the cross entropy alone), ``train/aux_loss``,
    ``val/loss`` and ``test/loss`` (means over all labels of the stage, whatever the sizes of the batches).

    The step of the routers' balance bias is lowered with the learning rate: its part of the peak is the routers' step_factor,
    so that with a schedule that ends at 0 the routing ends at rest. Nothing of it is kept but what the optimizer keeps.

    Args:
        network: logits, routing, losses = network(x, return_routing=True).
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and the number of training steps, which is the trainer's
            max_steps; stepped after every training step. None keeps the learning rate.
    """

    reports_routing: ClassVar[bool] = True

    def __init__(self, network: nn.Module, optimizer: OptimizerCallable, lr_scheduler: LRSchedulerCallable | None) -> None:
        super().__init__(network, optimizer, lr_scheduler)
        self.mean_loss = MeanMetric(nan_strategy=math.nan)  # what is not a number stays so: by default it would be left out

    def loss(self, logits: Tensor, label: Tensor) -> Tensor:
        """A scalar, the mean over the labels; by default the cross entropy in nats.

        Args:
            logits: what the network answers, [..., C], in float32 or float64. label: as batches have it.
        """
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), label.reshape(-1))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:  # noqa: ARG002
        self._set_step_factor(share_of_peak(self.trainer.optimizers))

    def on_train_end(self) -> None:
        self._set_step_factor(1.0)

    def _set_step_factor(self, factor: float) -> None:
        for layer in routed_layers(self).values():
            layer.router.step_factor.fill_(factor)

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
        loss = self.loss(exact, label)
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


def _detached(info: RoutingInfo, mask_BT: Tensor | None) -> RoutingInfo:
    kept: Any = ... if mask_BT is None else mask_BT
    return {
        "tile_idx": info["tile_idx"][kept],
        "weight": info["weight"].detach()[kept],
        "scores": info["scores"].detach()[kept],
    }
