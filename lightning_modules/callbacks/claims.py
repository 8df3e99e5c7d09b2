"""Watch which class goes to which tile.

Shape suffixes: E tiles, C classes.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import lightning as L
import torch
from rich import get_console
from rich.table import Table
from torch import Tensor, nn
from typing_extensions import override

from lightning_modules.callbacks.figures import DrawingBudget, add_figure, claim_figure, has_tensorboard, save_figure
from lightning_modules.callbacks.log_folder import local_log_folder
from lightning_modules.error_text import did_you_mean
from lightning_modules.errors import UserError
from lightning_modules.routed_layers import check_reports_routing, layer_name, routed_layers
from trix.routing import ClaimMatrix
from trix.whole_file import write_whole

CLAIMS_NAME = "claims.csv"
CLAIMS_COLUMNS = ("class", "layer", "favourite_tile", "claim_rate", "tile_purity", "count")


@dataclass(frozen=True)
class ClaimWatch:
    """One concept to follow: the share of a class's tokens that one tile of one layer gets.

    Args:
        class_name: one of the task's class_names; for a language model also the character itself.
        layer, tile: indices.

    Raises:
        ValueError: a negative index.
    """

    class_name: str | int
    layer: int
    tile: int

    def __post_init__(self) -> None:
        if self.layer < 0 or self.tile < 0:
            raise ValueError(f"layer ({self.layer}) and tile ({self.tile}) must be >= 0")

    @property
    def metric(self) -> str:
        return f"claims/{layer_name(self.layer)}/{self.class_name}/tile_{self.tile}"

    def class_idx(self, class_names: Sequence[str]) -> int:
        """Raises UserError where there is no such class."""
        name = str(self.class_name)
        for candidate in (name, repr(name)):  # the classes of a language model are characters, quoted
            if candidate in class_names:
                return class_names.index(candidate)
        hint = did_you_mean(name, class_names)
        raise UserError(f"class_name ({name}) must be one of the {len(class_names)} class_names of the task{hint}")


class _Claims(NamedTuple):
    """What a validation has counted for one layer, on all ranks; on the CPU."""

    rate_EC: Tensor
    purity_E: Tensor
    count_EC: Tensor


class ClaimMonitor(L.Callback):
    """Count, over each validation, how the tokens of each class are spread over the tiles of each layer.

    Logged for each layer: ``claims/<layer>/`` mean_claim_rate, lowest_claim_rate and highest_claim_rate, over the classes seen,
    of the share of a class's tokens that its favourite tile gets; mean_purity, the mean over used tiles of the share of the
    tile's most frequent class. For each ``watch`` also ``claims/<layer>/<class>/tile_<tile>``, the share of that class's tokens
    that this tile gets (NaN for a class not seen): :class:`SurgerySchedule` can wait for it.

    Of the last validation of a fit, all classes stand in claims.csv in the folder of the logs, however many: class, layer,
    favourite_tile, claim_rate (the share of the class that this tile gets), tile_purity, count (the class's assignments to all
    tiles). With few classes also a figure ``claims/class_by_tile`` for TensorBoard, of the last validation and of as many
    earlier ones as can be drawn in 1 % of the time; at the end of ``fit`` it is in the log folder as class_by_tile.png,
    and at the end of ``fit`` and ``validate`` there is a table: which class goes to which tile.
    Classes and their names are those of the task (``class_names``); the classes of a language model are its characters. A token
    of a classifier is of the class of its sequence; padding is not counted.

    Nothing is kept from one validation to the next, so there is no state to resume.

    Args:
        max_classes: with more classes there is neither figure nor table.
        watch: concepts to follow.

    Raises:
        ValueError: max_classes < 0. As the run starts, UserError: the task has no class_names or returns no routing, or a
            watched class, layer or tile is not there. In the run, UserError: labels are no integers.

    Example::

        trainer:
          callbacks+:
          - class_path: ClaimMonitor
            init_args:
              max_classes: 200
              watch: [{class_name: e, layer: 0, tile: 3}]
    """

    def __init__(self, max_classes: int = 32, watch: Sequence[ClaimWatch] = ()) -> None:
        if max_classes < 0:
            raise ValueError(f"max_classes ({max_classes}) must be >= 0")
        self.max_classes = max_classes
        self.watch = list(watch)
        self._claims: dict[str, ClaimMatrix] = {}
        self._budget = DrawingBudget()

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError unless the task has class_names, returns its routing, and what is watched is there."""
        class_names: Sequence[str] | None = getattr(network, "class_names", None)
        if class_names is None:
            raise UserError(f"ClaimMonitor needs a task with class_names, which {type(network).__name__} lacks")
        check_reports_routing(network, "ClaimMonitor")
        num_tiles = [layer.num_tiles for layer in routed_layers(network).values()]
        for watch in self.watch:
            watch.class_idx(class_names)
            if watch.layer >= len(num_tiles):
                raise UserError(f"watch: layer ({watch.layer}) must be < number of routed layers ({len(num_tiles)})")
            if watch.tile >= num_tiles[watch.layer]:
                size = num_tiles[watch.layer]
                raise UserError(f"watch: tile ({watch.tile}) must be < num_tiles ({size}) of layer {watch.layer}")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.check_network(pl_module)
        self._budget = DrawingBudget()

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
        label = outputs["label"]
        if label.is_floating_point():
            raise UserError(f"ClaimMonitor needs labels that are classes, int64; those of the data are {label.dtype}")
        for name, info in outputs["routing"].items():
            self._claims[name].update(info["tile_idx"], label, weight=info["weight"])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._claims:
            return
        class_names = _class_names(pl_module)
        claims = self._counted()
        for name, counted in claims.items():
            is_used_E, is_seen_C = counted.count_EC.sum(dim=1) > 0, counted.count_EC.sum(dim=0) > 0
            best_C = _or_zero(counted.rate_EC.amax(dim=0)[is_seen_C])
            metrics = {
                "mean_claim_rate": best_C.mean(),
                "lowest_claim_rate": best_C.amin(),
                "highest_claim_rate": best_C.amax(),
                "mean_purity": _or_zero(counted.purity_E[is_used_E]).mean(),
            }
            pl_module.log_dict({f"claims/{name}/{key}": value for key, value in metrics.items()})
        for watch in self.watch:
            counted, class_idx = claims[layer_name(watch.layer)], watch.class_idx(class_names)
            is_seen = counted.count_EC[:, class_idx].any()
            pl_module.log(watch.metric, torch.where(is_seen, counted.rate_EC[watch.tile, class_idx], torch.nan))
        if trainer.is_global_zero and self._is_drawn(trainer, class_names):
            if trainer.state.fn == "fit" and not self._budget.is_due():
                return
            with self._budget.drawing():
                add_figure(trainer, "claims/class_by_tile", claim_figure(_rates(claims), class_names))

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folder = local_log_folder(trainer)
        if not self._claims:
            return
        claims, class_names = self._counted(), _class_names(pl_module)
        if not trainer.is_global_zero:
            return
        self._print_table(claims, class_names)
        if folder is None:
            return
        write_whole(claims_csv(claims, class_names).encode(), folder / CLAIMS_NAME)
        if self._is_drawn(trainer, class_names):
            figure = claim_figure(_rates(claims), class_names)
            add_figure(trainer, "claims/class_by_tile", figure)
            save_figure(trainer, "class_by_tile.png", figure)

    def _is_drawn(self, trainer: L.Trainer, class_names: Sequence[str]) -> bool:
        return len(class_names) <= self.max_classes and has_tensorboard(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate" and self._claims:
            claims = self._counted()
            if trainer.is_global_zero:
                self._print_table(claims, _class_names(pl_module))

    def _print_table(self, claims: Mapping[str, _Claims], class_names: Sequence[str]) -> None:
        if len(class_names) <= self.max_classes:
            get_console().print(claim_table(_rates(claims), class_names))

    def _counted(self) -> dict[str, _Claims]:
        """By layer; every process has to ask, for it synchronises."""
        counted = {}
        for name, matrix in self._claims.items():
            rate_EC = matrix.compute()
            with matrix.sync_context():
                counted[name] = _Claims(rate_EC.cpu(), matrix.purity().cpu(), matrix.count_EC.cpu())
        return counted


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


def claims_csv(claims: Mapping[str, _Claims], class_names: Sequence[str]) -> str:
    """One row for each class and layer, in this order; a class never seen has a count of 0 and no favourite."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CLAIMS_COLUMNS)
    for class_idx, class_name in enumerate(class_names):
        for name, (rate_EC, purity_E, count_EC) in claims.items():
            count, tile = int(count_EC[:, class_idx].sum()), int(count_EC[:, class_idx].argmax())
            found = (tile, f"{rate_EC[tile, class_idx]:.6g}", f"{purity_E[tile]:.6g}") if count else ("", "", "")
            writer.writerow((class_name, name, *found, count))
    return text.getvalue()


def _rates(claims: Mapping[str, _Claims]) -> dict[str, Tensor]:
    return {name: counted.rate_EC for name, counted in claims.items()}


def _favourites(rate_E: Tensor, num_tiles: int) -> str:
    rate, tile_idx = rate_E.topk(min(num_tiles, len(rate_E)))
    return ", ".join(f"tile {tile} {share:.0%}" for share, tile in zip(rate.tolist(), tile_idx.tolist(), strict=True) if share)


def _or_zero(values: Tensor) -> Tensor:
    """Where nothing was counted, one 0."""
    return values if len(values) else torch.zeros(1)


def _class_names(pl_module: L.LightningModule) -> Sequence[str]:
    names: Sequence[str] = pl_module.class_names  # type: ignore[assignment]  # setup has made sure of it
    return names
