"""Watch how the routed layers spread the tokens, and what their signatures look like."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torchmetrics import MeanMetric
from typing_extensions import override

from lightning_modules.callbacks.figures import (
    DrawingBudget,
    add_figure,
    has_tensorboard,
    routing_figure,
    signature_figure,
    similarity_figure,
    tensorboard_loggers,
    usage_figure,
)
from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.callbacks.token_sample import TokenSample
from lightning_modules.routed_layers import check_reports_routing, routed_layers

MAX_TILES_BY_NAME = 32


class RoutingMonitor(L.Callback):
    """After each validation: statistics of its routing for every logger, histograms and figures for TensorBoard.

    Scalars, for each layer: ``routing/<layer>/`` balance (min / max share of a tile), max_over_mean_load, entropy_nats,
    relative_entropy (entropy / log E), confidence (mean gap of the best two scores), mean_k (tiles per token), churn (share of
    the first 2048 tokens whose best tile is another one than at the validation before; none where the data is not the same).
    With up to 32 tiles also ``tile_usage/<layer>/tile_<i>``, the share of the assignments that a tile got.

    Histograms: ``routing/<layer>/tiles``, the tile indices chosen, and ``routing/<layer>/confidences``, of the first 2048
    tokens. Figures: ``routing/signatures``, ``routing/usage``, ``routing/similarity`` (cosine of signatures, tile by tile) and
    ``routing/tokens`` (the first sequence of the validation, token by tile). They are drawn for the last validation of a fit,
    and for as many earlier ones as take at most 1 % of the time; outside of a fit for every one.

    A checkpoint holds the best tiles of those tokens, so that a resumed run logs the churn of an uninterrupted one.

    Args:
        figures: draw figures.

    Raises:
        UserError: as the run starts, where the task's steps do not return their routing.

    Example::

        trainer:
          callbacks+:
          - class_path: RoutingMonitor
            init_args: {figures: false}
    """

    def __init__(self, figures: bool = True) -> None:
        self.figures = figures
        self._statistics: dict[str, RoutingStatistics] = {}
        self._sample = TokenSample()
        self._earlier: dict[str, Any] = {}
        self._budget = DrawingBudget()
        self._usage: dict[str, Tensor] = {}  # of a validation of which nothing is drawn yet

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError unless the task's steps return their routing."""
        check_reports_routing(network, "RoutingMonitor")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.check_network(pl_module)
        # A run before has nothing to do with this one; the state of a checkpoint comes after setup.
        self._earlier, self._usage, self._budget = {}, {}, DrawingBudget()

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sample = TokenSample()
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
        self._sample.update(outputs, batch, pl_module)
        for name, info in outputs["routing"].items():
            self._statistics[name].update(info["tile_idx"], info["weight"], info["scores"])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._statistics:
            return
        results = {name: statistics.compute() for name, statistics in self._statistics.items()}
        count = {name: result.pop("count") for name, result in results.items()}
        self._usage = {name: result.pop("usage") for name, result in results.items()}
        for name, result in results.items():
            metrics = {f"routing/{name}/{key}": value for key, value in result.items()} | self._churn(name, pl_module)
            if len(self._usage[name]) <= MAX_TILES_BY_NAME:
                metrics |= {f"tile_usage/{name}/tile_{tile}": share for tile, share in enumerate(self._usage[name])}
            pl_module.log_dict(metrics)
        self._earlier = self._sample.state()
        for logger in tensorboard_loggers(trainer):
            for name, count_E in count.items():
                _add_tile_histogram(logger, f"routing/{name}/tiles", count_E, trainer.global_step)
                gap_N = self._sample.confidence_N[name]
                gap_N = gap_N[gap_N.isfinite()]  # no second tile to be had: no gap
                if len(gap_N):
                    tag = f"routing/{name}/confidences"
                    logger.experiment.add_histogram(tag, gap_N, global_step=trainer.global_step, bins=64)
        if trainer.state.fn != "fit" or self._budget.is_due():
            self._draw(trainer, pl_module)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._draw(trainer, pl_module)

    def _churn(self, name: str, pl_module: L.LightningModule) -> dict[str, Tensor]:
        mean = MeanMetric(nan_strategy="ignore").to(pl_module.device)
        changed = self._sample.num_changed(self._earlier, name)
        if changed is not None and changed[1]:
            mean.update(changed[0] / changed[1], changed[1])
        with mean.sync_context():  # on every rank; each has its own tokens
            return {f"routing/{name}/churn": mean.mean_value / mean.weight} if mean.weight > 0 else {}

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self.figures or not self._usage or not has_tensorboard(trainer) or not trainer.is_global_zero:
            return
        with self._budget.drawing():
            signatures = {name: layer.get_tile_signatures() for name, layer in routed_layers(pl_module).items()}
            add_figure(trainer, "routing/signatures", signature_figure(signatures))
            add_figure(trainer, "routing/usage", usage_figure(self._usage))
            add_figure(trainer, "routing/similarity", similarity_figure(signatures))
            if self._sample.first:
                add_figure(trainer, "routing/tokens", routing_figure(self._sample.first, self._sample.tokens))
        self._usage = {}

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"earlier": self._earlier}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = state_dict["earlier"]


def _add_tile_histogram(logger: TensorBoardLogger, tag: str, count_E: Tensor, step: int) -> None:
    """One bucket a tile, from the counts alone; add_histogram would want every token's index."""
    count = count_E.double().cpu()
    index = torch.arange(len(count), dtype=torch.float64)
    logger.experiment.add_histogram_raw(
        tag,
        # Not the first and last index: the buckets at the ends would be half as wide, and drawn twice as high.
        min=-0.5,
        max=len(count) - 0.5,
        num=int(count.sum()),
        sum=float((count * index).sum()),
        sum_squares=float((count * index**2).sum()),
        bucket_limits=(index + 0.5).tolist(),
        bucket_counts=count.tolist(),
        global_step=step,
    )
