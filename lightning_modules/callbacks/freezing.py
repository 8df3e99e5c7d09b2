"""Freeze and unfreeze signatures at set times."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_modules.errors import UserError
from lightning_modules.routed_layers import layer_name, routed_layers
from trix.nn import RoutedLayer
from trix.routing import SignatureRouter


@dataclass(frozen=True)
class FreezingEvent:
    """One change: what happens to which tiles of which layers, and when.

    Args:
        action: ``freeze`` holds the signatures at their present value, ``unfreeze`` lets them learn again.
        tiles: tile indices. layers: ``all``, or indices of routed layers.
        step, epoch: exactly one of them; the event happens before that training step or epoch, both counted from 0.

    Raises:
        ValueError: no or both times, a negative number, an index twice, or no tile or layer.
    """

    action: Literal["freeze", "unfreeze"]
    tiles: list[int]
    layers: Literal["all"] | list[int] = "all"
    step: int | None = None
    epoch: int | None = None

    def __post_init__(self) -> None:
        if self.action not in ("freeze", "unfreeze"):
            raise ValueError(f"action ({self.action!r}) must be 'freeze' or 'unfreeze'")
        if (self.step is None) == (self.epoch is None):
            raise ValueError(f"exactly one of step ({self.step}) and epoch ({self.epoch}) must be given")
        if min(time for time in (self.step, self.epoch) if time is not None) < 0:
            raise ValueError(f"step ({self.step}) or epoch ({self.epoch}) must be >= 0")
        _check_indices("tiles", self.tiles)
        if self.layers != "all":
            _check_indices("layers", self.layers)

    @property
    def time(self) -> str:
        return f"step {self.step}" if self.step is not None else f"epoch {self.epoch}"

    def __str__(self) -> str:
        layers = "all layers" if self.layers == "all" else f"layers {_listed(self.layers)}"
        return f"{self.action} tiles {_listed(self.tiles)} of {layers} at {self.time}"


class FreezingSchedule(L.Callback):
    """Apply each event once, at its time, in the given order; log ``freezing/<layer>``, the number of frozen signatures.

    A frozen signature is a value stored in the layer, so the checkpoint holds it, no optimizer moves it, and a resumed run
    goes on with it. Which events have been applied is kept by their content: one added to a resumed run whose time has passed
    is applied at once.

    Args:
        events: the changes.

    Raises:
        ValueError: no events, or the same event twice. As the run starts, UserError: a layer or tile that is not there, or a
            layer whose router has no signatures.
    """

    def __init__(self, events: list[FreezingEvent]) -> None:
        if not events:
            raise ValueError("number of events (0) must be >= 1")
        for index, event in enumerate(events):
            if event in events[:index]:
                raise ValueError(f"events[{index}] ({event}) must not repeat events[{events.index(event)}]")
        self.events = list(events)
        self._applied: list[FreezingEvent] = []

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError unless every event names layers and tiles that the network has and that can be frozen."""
        layers = list(routed_layers(network).values())
        for event in self.events:
            for index in range(len(layers)) if event.layers == "all" else event.layers:
                if index >= len(layers):
                    raise UserError(f"{event}: layer ({index}) must be < number of routed layers ({len(layers)})")
                if max(event.tiles) >= layers[index].num_tiles:
                    raise UserError(
                        f"{event}: tile ({max(event.tiles)}) must be < num_tiles ({layers[index].num_tiles}) of layer {index}"
                    )
                if not isinstance(layers[index].router, SignatureRouter):
                    kind = type(layers[index].router).__name__
                    raise UserError(f"{event}: the router ({kind}) of layer {index} has no signatures to freeze")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check_network(pl_module)

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        due = [
            event
            for event in self.events
            if event not in self._applied
            and (
                (event.step is not None and event.step <= trainer.global_step)
                or (event.epoch is not None and event.epoch <= trainer.current_epoch)
            )
        ]
        if not due:
            return
        layers = routed_layers(pl_module)
        for event in due:
            _apply(event, layers)
            self._applied.append(event)
            rank_zero_info(f"FreezingSchedule at step {trainer.global_step}: {event}")
        counts = {f"freezing/{name}": float(_num_frozen(layer)) for name, layer in layers.items()}
        for logger in trainer.loggers:
            logger.log_metrics(counts, step=trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"applied": [asdict(event) for event in self._applied]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._applied = [FreezingEvent(**event) for event in state_dict["applied"]]


def _apply(event: FreezingEvent, layers: dict[str, RoutedLayer]) -> None:
    names = list(layers) if event.layers == "all" else [layer_name(index) for index in event.layers]
    for name in names:
        for tile_idx in event.tiles:
            if event.action == "freeze":
                layers[name].freeze_signature(tile_idx)
            else:
                layers[name].unfreeze_signature(tile_idx)


def _num_frozen(layer: RoutedLayer) -> int:
    if not isinstance(layer.router, SignatureRouter):
        return 0
    return sum(layer.is_frozen(tile_idx) for tile_idx in range(layer.num_tiles))


def _check_indices(name: str, indices: Sequence[int]) -> None:
    if not indices:
        raise ValueError(f"number of {name} (0) must be >= 1")
    if min(indices) < 0:
        raise ValueError(f"{name} ({_listed(indices)}) must be >= 0")
    if len(set(indices)) != len(indices):
        raise ValueError(f"{name} ({_listed(indices)}) must be distinct")


def _listed(indices: Sequence[int]) -> str:
    return ", ".join(str(index) for index in indices)
