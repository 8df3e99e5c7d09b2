"""Watch which class goes to which tile."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from rich import get_console
from rich.table import Table
from torch import Tensor
from typing_extensions import override

from lightning_modules.callbacks.figures import add_figure, claim_figure, has_tensorboard, save_figure
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from trix.routing import ClaimMatrix


class ClaimMonitor(L.Callback):
    """Count, over each validation, how the tokens of each class are spread over the tiles of each layer.

    Logged for each layer: ``claims/<layer>/mean_claim_rate``, the mean over classes of the share of a class's tokens that its
    favourite tile gets; ``claims/<layer>/mean_purity``, the mean over used tiles of the share of the tile's most frequent
    class. With few classes also a figure ``claims/class_by_tile`` for TensorBoard, which stands at the end of ``fit`` in the
    folder of the logs as class_by_tile.png, and at the end of ``fit`` and ``validate`` a table: which class goes to which tile.
    Classes and their names are those of the task (``class_names``); the classes of a language model are its characters. A token
    of a classifier is of the class of its sequence; padding is not counted.

    Nothing is kept from one validation to the next, so there is no state to resume.

    Args:
        max_classes: with more classes there is neither figure nor table.

    Raises:
        ValueError: max_classes < 0. As the run starts, UserError: the task has no class_names.
    """

    def __init__(self, max_classes: int = 32) -> None:
        if max_classes < 0:
            raise ValueError(f"max_classes ({max_classes}) must be >= 0")
        self.max_classes = max_classes
        self._claims: dict[str, ClaimMatrix] = {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if getattr(pl_module, "class_names", None) is None:
            raise UserError(f"ClaimMonitor needs a task with class_names, which {type(pl_module).__name__} lacks")

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        num_classes = len(_class_names(pl_module))
        self._claims = {
            name: ClaimMatrix(layer.num_tiles, num_classes).to(pl_module.device)
            for name, layer in routed_layers(pl_module).items()
        }

    @override
    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for name, info in outputs["routing"].items():
            self._claims[name].update(info["tile_idx"], outputs["label"])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._claims:
            return
        rates = {name: claims.compute() for name, claims in self._claims.items()}
        for name, claims in self._claims.items():
            with claims.sync_context():
                purity_E, is_used_E = claims.purity(), claims.count_EC.sum(dim=1) > 0
                is_seen_C = claims.count_EC.sum(dim=0) > 0
            metrics = {
                "mean_claim_rate": _mean(rates[name].amax(dim=0)[is_seen_C]),
                "mean_purity": _mean(purity_E[is_used_E]),
            }
            pl_module.log_dict({f"claims/{name}/{key}": value for key, value in metrics.items()})
        class_names = _class_names(pl_module)
        if len(class_names) <= self.max_classes and has_tensorboard(trainer) and trainer.is_global_zero:
            add_figure(trainer, "claims/class_by_tile", claim_figure(rates, class_names))

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._print_table(trainer, pl_module)
        class_names = _class_names(pl_module)
        if len(class_names) <= self.max_classes and self._claims and has_tensorboard(trainer):
            rates = {name: claims.compute() for name, claims in self._claims.items()}  # on every rank: it synchronises
            save_figure(trainer, "class_by_tile.png", claim_figure(rates, class_names))

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._print_table(trainer, pl_module)

    def _print_table(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        class_names = _class_names(pl_module)
        if len(class_names) > self.max_classes or not self._claims:
            return
        rates = {name: claims.compute() for name, claims in self._claims.items()}  # on every rank: it synchronises
        if trainer.is_global_zero:
            get_console().print(claim_table(rates, class_names))


def claim_table(rates: dict[str, Tensor], class_names: Sequence[str], num_tiles: int = 2) -> Table:
    """For each class seen and each layer, the tiles that get most of its tokens, with their shares; rates are [E, C]."""
    table = Table(title="Which class goes to which tile (share of the class)")
    table.add_column("class")
    for name in rates:
        table.add_column(name)
    for class_idx, class_name in enumerate(class_names):
        cells = [_favourites(rate_EC[:, class_idx], num_tiles) for rate_EC in rates.values()]
        if any(cells):
            table.add_row(class_name, *cells)
    return table


def _favourites(rate_E: Tensor, num_tiles: int) -> str:
    rate, tile_idx = rate_E.topk(min(num_tiles, len(rate_E)))
    return ", ".join(f"tile {tile} {share:.0%}" for share, tile in zip(rate.tolist(), tile_idx.tolist(), strict=True) if share)


def _mean(values: Tensor) -> Tensor:
    return values.mean() if len(values) else torch.zeros((), device=values.device)


def _class_names(pl_module: L.LightningModule) -> Sequence[str]:
    names: Sequence[str] = pl_module.class_names  # type: ignore[assignment]  # setup has made sure of it
    return names
