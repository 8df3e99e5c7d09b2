"""Insert, freeze and unfreeze signatures at set times, or once a metric says so."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import layer_name, routed_layers
from lightning_modules.signature_values import signature_from
from trix.evolution import reset_signature_state
from trix.nn import RoutedLayer
from trix.routing import SignatureRouter

Action = Literal["insert", "freeze", "unfreeze"]


@dataclass(frozen=True)
class MetricCondition:
    """A logged metric goes over or under a bound.

    Args:
        metric: its name, as in the logs. above, below: exactly one of them; the metric must be > above, or < below.

    Raises:
        ValueError: no or both bounds, or one that is not finite.
    """

    metric: str
    above: float | None = None
    below: float | None = None

    def __post_init__(self) -> None:
        if (self.above is None) == (self.below is None):
            raise ValueError(f"exactly one of above ({self.above}) and below ({self.below}) must be given")
        if not all(math.isfinite(bound) for bound in (self.above, self.below) if bound is not None):
            raise ValueError(f"above ({self.above}) or below ({self.below}) must be finite")

    def is_met(self, value: float) -> bool:
        """NaN meets none."""
        return (self.above is not None and value > self.above) or (self.below is not None and value < self.below)

    def __str__(self) -> str:
        return f"{self.metric} > {self.above}" if self.above is not None else f"{self.metric} < {self.below}"


@dataclass(frozen=True)
class SurgeryEvent:
    """One change: what happens to which tiles of which layers, and when.

    Args:
        action: ``insert`` gives a tile a designed signature, ``freeze`` holds signatures at their present value, ``unfreeze``
            lets them learn again.
        tiles: ``all`` in use, or tile indices; one index for insert. layers: ``all``, or indices of routed layers.
        step, epoch, share, when: exactly one of them; the event happens before that training step or epoch, both counted from
            0; before the step round(share * trainer.max_steps); or after the first validation at which the condition is met.
        signature: what an inserted tile answers to: signs ("+0-", in YAML with quotes), a list of -1, 0 and 1, or
            positive_dims and negative_dims.
        freeze: whether an inserted tile holds its signature; without it, learning goes on from it.
        tag: a name for the layer's surgery history.

    Raises:
        ValueError: no time or several, a negative number, a share outside [0, 1), an index twice, no tile or layer, an insert
            without a signature or with several tiles, or a signature or freeze of another action.
    """

    action: Action
    tiles: Literal["all"] | list[int]
    layers: Literal["all"] | list[int] = "all"
    step: int | None = None
    epoch: int | None = None
    share: float | None = None
    when: MetricCondition | None = None
    signature: str | list[float] | dict[str, list[int]] | None = None
    freeze: bool = True
    tag: str = ""

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise ValueError(f"action ({self.action!r}) must be 'insert', 'freeze' or 'unfreeze'")
        if sum(time is not None for time in (self.step, self.epoch, self.share, self.when)) != 1:
            times = f"step ({self.step}), epoch ({self.epoch}), share ({self.share}) and when ({self.when})"
            raise ValueError(f"exactly one of {times} must be given")
        if any(time is not None and time < 0 for time in (self.step, self.epoch)):
            raise ValueError(f"step ({self.step}) or epoch ({self.epoch}) must be >= 0")
        if self.share is not None and not 0 <= self.share < 1:
            raise ValueError(f"share ({self.share}) must be >= 0 and < 1")
        if self.tiles != "all":
            _check_indices("tiles", self.tiles)
        if self.layers != "all":
            _check_indices("layers", self.layers)
        if self.action == "insert":
            if self.signature is None:
                raise ValueError("insert needs a signature")
            if self.tiles == "all" or len(self.tiles) != 1:
                number = self.tiles if self.tiles == "all" else len(self.tiles)
                raise ValueError(f"number of tiles ({number}) of an insert must be 1")
        elif self.signature is not None or not self.freeze:
            key = "freeze" if self.signature is None else "signature"
            raise ValueError(f"{key} ({getattr(self, key)}) belongs to insert, not to {self.action}")

    @property
    def time(self) -> str:
        if self.when is not None:
            return f"once {self.when}"
        if self.share is not None:
            return f"at {self.share:.0%} of the steps"
        return f"at step {self.step}" if self.step is not None else f"at epoch {self.epoch}"

    def __str__(self) -> str:
        layers = "all layers" if self.layers == "all" else f"layers {_listed(self.layers)}"
        tag = f", tag {self.tag!r}" if self.tag else ""
        tiles = "all tiles" if self.tiles == "all" else f"tiles {_listed(self.tiles)}"
        return f"{self.action} {tiles} of {layers} {self.time}{tag}"


class SurgerySchedule(L.Callback):
    """Apply each event once, in the given order; log ``surgery/<layer>/frozen``, the number of frozen signatures.

    A frozen signature is a value stored in the layer, so the checkpoint holds it, no optimizer moves it, and a resumed run
    goes on with it. What the optimizer remembers of a signature is forgotten when another is inserted in its place; the tile
    keeps its weights. Each act stands in the layer's surgery history, with the event's tag.

    A condition reads the metrics that the trainer has after each validation of the fit (``trainer.callback_metrics``); what it
    asks for happens before the next training step, so that the checkpoint of that validation is of the network that was
    measured. Under ddp it must be met on all ranks. Sharded parameters (fsdp) are not for it.

    Which events have been applied is kept by their content: one added to a resumed run whose time has passed is applied at
    once. The end of the training names those that never came.

    Args:
        events: the changes.

    Raises:
        ValueError: no events, or the same event twice. As the run starts, UserError: a layer or tile that is not there, a
            layer whose router has no signatures, a signature that does not fit, or a condition in a run without validation.
            After a validation, UserError: no metric of the name has been logged.

    Example::

        trainer:
          callbacks+:
          - class_path: SurgerySchedule
            init_args:
              events:
              - {action: insert, tiles: [3], signature: {positive_dims: [0, 1], negative_dims: [7]}, step: 100, tag: concept}
              - {action: unfreeze, tiles: [3], step: 300, tag: concept}
              - {action: freeze, tiles: [0, 1], layers: [1], when: {metric: val/loss, below: 2.5}}
              - {action: freeze, tiles: all, share: 0.3}
    """

    def __init__(self, events: list[SurgeryEvent]) -> None:
        if not events:
            raise ValueError("number of events (0) must be >= 1")
        for index, event in enumerate(events):
            if event in events[:index]:
                raise ValueError(f"events[{index}] ({event}) must not repeat events[{events.index(event)}]")
        self.events = list(events)
        # By content, as plain values: events whose condition has been met, and those that have been applied.
        self._met: list[dict[str, Any]] = []
        self._applied: list[dict[str, Any]] = []

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError unless every event names layers and tiles that the network has and that take the change."""
        layers = routed_layers(network)
        for event in self.events:
            for index in range(len(layers)) if event.layers == "all" else event.layers:
                if index >= len(layers):
                    raise UserError(f"{event}: layer ({index}) must be < number of routed layers ({len(layers)})")
                _check_layer(event, index, layers[layer_name(index)])

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check_network(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for event in self.events:
            if event.share is not None and trainer.max_steps < 1:
                raise UserError(
                    f"{event}: trainer.max_steps ({trainer.max_steps}) must be >= 1: the share is of that many steps"
                )
        conditional = [event for event in self.events if event.when is not None]
        if conditional and not trainer.enable_validation:
            raise UserError(f"{conditional[0]}: conditions are judged after validations, of which this run has none")

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        metrics = trainer.callback_metrics
        for event in self.events:
            if event.when is None or asdict(event) in self._met:
                continue
            if event.when.metric not in metrics:
                raise UserError(f"{event}: {_no_metric(event.when.metric, metrics)}")
            is_met = event.when.is_met(float(metrics[event.when.metric]))
            if trainer.strategy.reduce_boolean_decision(is_met):  # all ranks do the same, whatever each has measured
                self._met.append(asdict(event))

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        due = [event for event in self.events if asdict(event) not in self._applied and self._is_due(event, trainer)]
        if not due:
            return
        layers = routed_layers(pl_module)
        for event in due:
            _apply(event, layers, trainer.optimizers)
            self._applied.append(asdict(event))
            rank_zero_info(f"SurgerySchedule at step {trainer.global_step}: {event}")
        counts = {f"surgery/{name}/frozen": float(_num_frozen(layer)) for name, layer in layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=trainer.global_step)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for event in self.events:
            if asdict(event) not in self._applied:
                rank_zero_info(f"SurgerySchedule: the training ended at step {trainer.global_step} before: {event}")

    def _is_due(self, event: SurgeryEvent, trainer: L.Trainer) -> bool:
        if event.when is not None:
            return asdict(event) in self._met
        if event.step is not None:
            return event.step <= trainer.global_step
        if event.share is not None:
            return round(event.share * trainer.max_steps) <= trainer.global_step
        assert event.epoch is not None
        return event.epoch <= trainer.current_epoch

    @override
    def state_dict(self) -> dict[str, Any]:
        return copy.deepcopy({"met": self._met, "applied": self._applied})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Files from before there was a share do not name it.
        self._met, self._applied = (
            [event | {"share": event.get("share")} for event in state_dict[name]] for name in ("met", "applied")
        )


def _check_layer(event: SurgeryEvent, index: int, layer: RoutedLayer) -> None:
    if event.tiles != "all" and max(event.tiles) >= layer.num_tiles:
        raise UserError(f"{event}: tile ({max(event.tiles)}) must be < num_tiles ({layer.num_tiles}) of layer {index}")
    if not isinstance(layer.router, SignatureRouter):
        kind = type(layer.router).__name__
        raise UserError(f"{event}: the router ({kind}) of layer {index} has no signatures to {event.action}")
    if event.action == "insert":
        try:
            signature_D = torch.tensor(signature_from(event.signature, layer.router.d_model, "signature"))
            copy.deepcopy(layer.router).insert(_only_tile(event), signature_D, event.freeze)  # says what the layer would say
        except (UserError, ValueError) as error:
            raise UserError(f"{event}: {error}") from error


def _apply(event: SurgeryEvent, layers: dict[str, RoutedLayer], optimizers: Iterable[Optimizer]) -> None:
    names = list(layers) if event.layers == "all" else [layer_name(index) for index in event.layers]
    for layer in (layers[name] for name in names):
        if event.action == "insert":
            signature_D = torch.tensor(signature_from(event.signature, layer.router.d_model, "signature"))
            layer.insert_signature(_only_tile(event), signature_D, event.freeze, event.tag)
            for optimizer in optimizers:
                reset_signature_state(optimizer, layer, _only_tile(event))
        elif event.tiles == "all":
            (layer.freeze_all_signatures if event.action == "freeze" else layer.unfreeze_all_signatures)(event.tag)
        else:
            act = layer.freeze_signature if event.action == "freeze" else layer.unfreeze_signature
            for tile_idx in event.tiles:
                act(tile_idx, event.tag)


def _only_tile(event: SurgeryEvent) -> int:
    assert event.tiles != "all"
    return event.tiles[0]


def _no_metric(name: str, metrics: Iterable[str]) -> str:
    """What is wrong, with the name most like it of those there are."""
    names = sorted(metrics)
    hint = did_you_mean(name, names, cutoff=0.0)
    if name.startswith("claims/"):
        hint += " (ClaimMonitor logs the claims, those of one class where its `watch` names it)"
    return f"metric ({name}) must be one of the {len(names)} that have been logged by the end of a validation{hint}"


def _num_frozen(layer: RoutedLayer) -> int:
    if not isinstance(layer.router, SignatureRouter):
        return 0
    return int(layer.router.is_frozen_E.sum())


def _check_indices(name: str, indices: Sequence[int]) -> None:
    if not indices:
        raise ValueError(f"number of {name} (0) must be >= 1")
    if min(indices) < 0:
        raise ValueError(f"{name} ({_listed(indices)}) must be >= 0")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{name} ({_listed(indices)}) must be distinct")


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(str(index) for index in indices)
