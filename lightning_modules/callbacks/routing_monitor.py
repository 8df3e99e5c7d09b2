"""Watch how the routed layers spread the tokens, and what their signatures look like."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from typing_extensions import override

from lightning_modules.callbacks.figures import add_figure, has_tensorboard, signature_figure, usage_figure
from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.routed_layers import routed_layers


class RoutingMonitor(L.Callback):
    """After each validation: statistics of its routing for every logger, figures and histograms for TensorBoard.

    Scalars, for each layer: ``routing/<layer>/`` balance (min / max share of a tile), max_over_mean_load, entropy_nats,
    relative_entropy (entropy / log E), confidence (mean gap of the best two scores). Figures: ``routing/signatures`` and
    ``routing/usage``. Histograms: ``routing/<layer>/tiles``, the tile indices chosen.

    Nothing is kept from one validation to the next, so there is no state to resume.

    Args:
        figures: draw figures; they cost about half a second for each validation.

    Example::

        trainer:
          callbacks+:
          - class_path: RoutingMonitor
            init_args: {figures: false}
    """

    def __init__(self, figures: bool = True) -> None:
        self.figures = figures
        self._statistics: dict[str, RoutingStatistics] = {}

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._statistics = {
            name: RoutingStatistics(layer.num_tiles).to(pl_module.device) for name, layer in routed_layers(pl_module).items()
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
            self._statistics[name].update(info["tile_idx"], info["scores"])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._statistics:
            return
        results = {name: statistics.compute() for name, statistics in self._statistics.items()}
        count = {name: result.pop("count") for name, result in results.items()}
        usage = {name: result.pop("usage") for name, result in results.items()}
        for name, result in results.items():
            pl_module.log_dict({f"routing/{name}/{key}": value for key, value in result.items()})
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                for name, count_E in count.items():
                    _add_tile_histogram(logger, f"routing/{name}/tiles", count_E, trainer.global_step)
        if self.figures and has_tensorboard(trainer) and trainer.is_global_zero:
            signatures = {name: layer.get_tile_signatures() for name, layer in routed_layers(pl_module).items()}
            add_figure(trainer, "routing/signatures", signature_figure(signatures))
            add_figure(trainer, "routing/usage", usage_figure(usage))


def _add_tile_histogram(logger: TensorBoardLogger, tag: str, count_E: Tensor, step: int) -> None:
    """One bucket a tile, from the counts alone; add_histogram would want every token's index."""
    count = count_E.double().cpu()
    index = torch.arange(len(count), dtype=torch.float64)
    logger.experiment.add_histogram_raw(
        tag,
        min=0,
        max=len(count) - 1,
        num=int(count.sum()),
        sum=float((count * index).sum()),
        sum_squares=float((count * index**2).sum()),
        bucket_limits=(index + 0.5).tolist(),
        bucket_counts=count.tolist(),
        global_step=step,
    )
