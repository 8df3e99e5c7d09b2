"""Watch how the routed layers spread the tokens, and what their signatures look like."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
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
from lightning_modules.callbacks.routing_factors import FACTORS, FeatureNotes
from lightning_modules.callbacks.routing_statistics import RoutingStatistics
from lightning_modules.callbacks.token_sample import TokenSample
from lightning_modules.routed_layers import check_reports_routing, routed_layers

MAX_TILES_BY_NAME = 32
CHURN_STEPS, MAX_CHURN = 50, 0.1
_REMEDY = "route_on: context holds the features still, signatures: drawn the signatures, balance_rate: 0 the bias"


class RoutingMonitor(L.Callback):
    """After each validation: statistics of its routing for every logger, histograms and figures for TensorBoard.

    Scalars, for each layer: ``routing/<layer>/`` balance (min / max share of a tile), max_over_mean_load, entropy_nats,
    relative_entropy (entropy / log E), confidence (mean gap of the best two scores), mean_k (tiles per token), churn (share of
    the first 2048 tokens whose best tile is another one than at the validation before; none where the data is not the same);
    and what of the choice moved: churn_features, churn_signatures, churn_bias (share of these tokens whose best tile changes
    when one factor alone is replaced by its present value, while the other two are as they were at the validation before: what
    the router reads of the tokens, its directions, its bias; each tile is scored for it, whatever the search of a hierarchical
    router would visit; none where the choice is not decided by directions, as that of a hash).
    With up to 32 tiles also ``tile_usage/<layer>/tile_<i>``, the share of the assignments that a tile got.

    Histograms: ``routing/<layer>/tiles``, the tile indices chosen, and ``routing/<layer>/confidences``, of the first 2048
    tokens. Figures: ``routing/signatures``, ``routing/usage``, ``routing/similarity`` (cosine of signatures, tile by tile) and
    ``routing/tokens`` (the first sequence of the validation, token by tile). They are drawn for the last validation of a fit,
    and for as many earlier ones as take at most 1 % of the time; outside of a fit for every one.

    A warning, once for each layer: in the second half of a training more than 10 % of the tokens change tile per 50 steps. Of
    a churn of c over n > 50 steps that is 1 - (1 - c)^(50 / n), as if a token had the same chance to change at every step; over
    fewer steps it is c, for tokens that come back would be counted twice. It names the factor that moved most and what holds
    each of them still.

    A checkpoint holds the best tiles of those tokens and the three factors, float32, so that a resumed run logs the churn of an
    uninterrupted one: 2048 * d_model * 4 bytes for each layer, or for all layers together where they read the same.

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
        self._notes = FeatureNotes()
        self._warned: list[str] = []
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
        self._earlier, self._usage, self._budget, self._warned = {}, {}, DrawingBudget(), []

    @override
    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._sample = TokenSample()
        self._statistics = {
            name: RoutingStatistics(layer.num_tiles).to(pl_module.device) for name, layer in routed_layers(pl_module).items()
        }

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not self._sample.is_full:
            self._notes.begin(routed_layers(pl_module))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._notes.end()

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
        self._sample.update(outputs, batch, pl_module, self._notes.read_TD)
        self._notes.end()
        for name, info in outputs["routing"].items():
            self._statistics[name].update(info["tile_idx"], info["weight"], info["scores"])

    @override
    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self._statistics:
            return
        results = {name: statistics.compute() for name, statistics in self._statistics.items()}
        # torchmetrics makes scalars of what a layer with a single tile has.
        count = {name: result.pop("count").reshape(-1) for name, result in results.items()}
        self._usage = {name: result.pop("usage").reshape(-1) for name, result in results.items()}
        for name, result in results.items():
            metrics = {f"routing/{name}/{key}": value for key, value in result.items()} | self._churn(name, trainer, pl_module)
            if len(self._usage[name]) <= MAX_TILES_BY_NAME:
                metrics |= {f"tile_usage/{name}/tile_{tile}": share for tile, share in enumerate(self._usage[name])}
            pl_module.log_dict(metrics)
        self._earlier = self._sample.state() | {"step": trainer.global_step}
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

    def _churn(self, name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Tensor]:
        changed, tokens = self._sample.num_changed(self._earlier, name) or (0, 0)
        moved = self._sample.num_moved(self._earlier, name)
        by_factor = [0] * len(FACTORS) if moved is None else [moved[factor] for factor in FACTORS]
        counts = torch.tensor([changed, tokens, 0 if moved is None else tokens, *by_factor], device=pl_module.device)
        # On every rank, as each has its own tokens.
        num_changed, num_tokens, num_split, *of_factors = trainer.strategy.reduce(counts, reduce_op="sum").float()
        if num_tokens == 0:
            return {}
        shares = {factor: number / num_split for factor, number in zip(FACTORS, of_factors, strict=True) if num_split > 0}
        self._warn(name, float(num_changed / num_tokens), {factor: float(share) for factor, share in shares.items()}, trainer)
        found = {f"routing/{name}/churn_{factor}": share for factor, share in shares.items()}
        return {f"routing/{name}/churn": num_changed / num_tokens} | found

    def _warn(self, name: str, churn: float, shares: dict[str, float], trainer: L.Trainer) -> None:
        step = self._earlier.get("step", trainer.global_step)
        num_steps = trainer.global_step - step
        if name in self._warned or num_steps < 1 or not _is_second_half(trainer, step):
            return
        rate = 1.0 - (1.0 - churn) ** min(CHURN_STEPS / num_steps, 1.0)
        if rate <= MAX_CHURN:
            return
        self._warned.append(name)
        by_factor = ", ".join(f"{factor} {share:.0%}" for factor, share in shares.items())
        mostly = f", mostly by its {max(shares, key=shares.__getitem__)} (each alone: {by_factor})" if shares else ""
        rank_zero_warn(
            f"{name}: {churn:.0%} of the tokens changed tile from step {step} to {trainer.global_step}{mostly}. That is at "
            f"least {rate:.0%} per {CHURN_STEPS} steps in the second half of the training, and a tile learns only while its "
            f"tokens stay: {_REMEDY}"
        )

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
        return {"earlier": self._earlier, "warned": list(self._warned)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier, self._warned = state_dict["earlier"], list(state_dict.get("warned", []))


def _is_second_half(trainer: L.Trainer, step: int) -> bool:
    """Whether the step lies there; where the training ends by its epochs, whether it is now."""
    if trainer.state.fn != "fit":
        return False
    if trainer.max_steps > 0:
        return 2 * step >= trainer.max_steps
    return 0 < (trainer.max_epochs or 0) <= 2 * trainer.current_epoch


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
