"""Watch that tiles do not come to answer to the same thing, and act where they do."""

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_modules.routed_layers import routed_layers
from trix.evolution import reset_tile_state
from trix.nn import RoutedLayer, SparseLookupFFNv2, TriXFFN
from trix.routing import SignatureRouter
from trix.routing.diversity import lowered_weight, raised_weight

Level = Literal["soft", "medium", "hard"]
WeighableLayer = TriXFFN | SparseLookupFFNv2  # what has a diversity loss
LEVELS: tuple[Level, ...] = ("soft", "medium", "hard")


class DiversityMonitor(L.Callback):
    """Log ``diversity/<layer>`` and ``diversity/mean``; warn when a layer falls below a threshold, and act as ``level`` says.

    The diversity of a layer is the mean, over pairs of its tiles, of the fraction of positions at which their signatures
    differ, in [0, 1]. A layer with one tile has none and is left out. A warning is given once, and again only after the layer
    has recovered; a resumed run remembers.

    Each level does what those before it do:

    soft    warns.
    medium  doubles the weight of a layer's diversity loss at each look below the threshold, up to ``max_weight``, and halves it
            at each look from there on, down to the weight that the layer was made with; logs ``diversity_weight/<layer>``.
    hard    draws collapsed tiles of a TriXFFN anew: those whose signature repeats another's but for a fraction
            ``min_difference`` of its positions. The optimizer's memory of them is reset, and the surgery history says so. Not
            together with :class:`Evolution`, whose splits begin as such a pair.

    Args:
        threshold: warn and act below it, in [0, 1]. every_n_steps: training steps between two looks.

    Raises:
        ValueError: threshold or min_difference outside [0, 1], every_n_steps < 1, max_weight <= 0, or another level.

    Example::

        trainer:
          callbacks+:
          - class_path: DiversityMonitor
            init_args: {level: medium, threshold: 0.5, every_n_steps: 25}
    """

    def __init__(
        self,
        threshold: float = 0.4,
        every_n_steps: int = 50,
        level: Level = "soft",
        max_weight: float = 1.0,
        min_difference: float = 0.05,
    ) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold ({threshold}) must be in [0, 1]")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps ({every_n_steps}) must be >= 1")
        if level not in LEVELS:
            raise ValueError(f"level ({level!r}) must be 'soft', 'medium' or 'hard'")
        if not max_weight > 0.0:
            raise ValueError(f"max_weight ({max_weight}) must be > 0")
        if not 0.0 <= min_difference < 1.0:
            raise ValueError(f"min_difference ({min_difference}) must be >= 0 and < 1")
        self.threshold, self.every_n_steps, self.level = threshold, every_n_steps, level
        self.max_weight, self.min_difference = max_weight, min_difference
        self._low_layers: set[str] = set()
        self._last_step = -1
        self._weights: dict[str, float] = {}
        self._least_weights: dict[str, float] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for name, layer in _weighable(routed_layers(pl_module)).items():
            self._least_weights.setdefault(name, layer.diversity_weight)
            if self.level != "soft" and name in self._weights:
                layer.diversity_weight = self._weights[name]

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradients accumulated, several batches belong to one step.
        if trainer.global_step % self.every_n_steps or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        layers = {name: layer for name, layer in routed_layers(pl_module).items() if layer.num_tiles > 1}
        if not layers:
            return
        diversity = {name: layer.get_signature_diversity() for name, layer in layers.items()}
        metrics = {f"diversity/{name}": value for name, value in diversity.items()}
        metrics["diversity/mean"] = sum(diversity.values()) / len(diversity)
        if self.level != "soft":
            for name, layer in _weighable(layers).items():
                self._set_weight(name, layer, diversity[name])
                metrics[f"diversity_weight/{name}"] = layer.diversity_weight
        # Straight to the loggers: the trainer writes only every log_every_n_steps. log_dict is for EarlyStopping and the like.
        pl_module.log_dict(metrics, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._warn(diversity, trainer.global_step)
        if self.level == "hard":
            for index, name in enumerate(layers):
                self._reseed(trainer, index, name, layers[name])

    def _set_weight(self, name: str, layer: WeighableLayer, diversity: float) -> None:
        if diversity < self.threshold:
            layer.diversity_weight = raised_weight(layer.diversity_weight, diversity, self.threshold, limit=self.max_weight)
        else:
            layer.diversity_weight = lowered_weight(layer.diversity_weight, self._least_weights[name], limit=self.max_weight)
        self._weights[name] = layer.diversity_weight

    def _reseed(self, trainer: L.Trainer, index: int, name: str, layer: RoutedLayer) -> None:
        if not isinstance(layer, TriXFFN) or not isinstance(layer.router, SignatureRouter):
            return
        # fork_rng: what is drawn must neither differ between ranks nor move the generator that the run uses.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(1000 * trainer.global_step + index)  # torch.manual_seed: also a GPU's
            tiles = layer.reseed_collapsed_tiles(self.min_difference, tag="diversity")
        for tile_idx in tiles:
            for optimizer in trainer.optimizers:
                reset_tile_state(optimizer, layer, tile_idx)
            rank_zero_info(f"DiversityMonitor at step {trainer.global_step}: {name}: collapsed tile {tile_idx} drawn anew")

    def _warn(self, diversity: dict[str, float], step: int) -> None:
        for name, value in diversity.items():
            if value >= self.threshold:
                self._low_layers.discard(name)
            elif name not in self._low_layers:
                self._low_layers.add(name)
                rank_zero_warn(f"signature diversity of {name} ({value:.3f}) fell below {self.threshold} at step {step}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "low_layers": sorted(self._low_layers),
            "last_step": self._last_step,
            "weights": dict(self._weights),
            "least_weights": dict(self._least_weights),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._low_layers, self._last_step = set(state_dict["low_layers"]), state_dict["last_step"]
        self._weights, self._least_weights = dict(state_dict["weights"]), dict(state_dict["least_weights"])


def _weighable(layers: dict[str, RoutedLayer]) -> dict[str, WeighableLayer]:
    return {name: layer for name, layer in layers.items() if isinstance(layer, WeighableLayer)}
