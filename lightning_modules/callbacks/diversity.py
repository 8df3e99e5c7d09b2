"""Watch that tiles do not come to answer to the same thing."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_modules.routed_layers import routed_layers


class DiversityMonitor(L.Callback):
    """Log ``diversity/<layer>`` and ``diversity/mean``; warn when a layer falls below a threshold.

    The diversity of a layer is the mean, over pairs of its tiles, of the fraction of positions at which their signatures
    differ, in [0, 1]. A layer with one tile has none and is left out. A warning is given once, and again only after the layer
    has recovered; a resumed run remembers.

    Args:
        threshold: warn below it, in [0, 1]. every_n_steps: training steps between two looks.

    Raises:
        ValueError: threshold outside [0, 1], or every_n_steps < 1.
    """

    def __init__(self, threshold: float = 0.4, every_n_steps: int = 50) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise ValueError(f"threshold ({threshold}) must be in [0, 1]")
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps ({every_n_steps}) must be >= 1")
        self.threshold, self.every_n_steps = threshold, every_n_steps
        self._low_layers: set[str] = set()
        self._last_step = -1

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradients accumulated, several batches belong to one step.
        if trainer.global_step % self.every_n_steps or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        diversity = {
            name: layer.get_signature_diversity() for name, layer in routed_layers(pl_module).items() if layer.num_tiles > 1
        }
        if not diversity:
            return
        metrics = {f"diversity/{name}": value for name, value in diversity.items()}
        metrics["diversity/mean"] = sum(diversity.values()) / len(diversity)
        # Straight to the loggers: the trainer writes only every log_every_n_steps. log_dict is for EarlyStopping and the like.
        pl_module.log_dict(metrics, logger=False)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
        self._warn(diversity, trainer.global_step)

    def _warn(self, diversity: dict[str, float], step: int) -> None:
        for name, value in diversity.items():
            if value >= self.threshold:
                self._low_layers.discard(name)
            elif name not in self._low_layers:
                self._low_layers.add(name)
                rank_zero_warn(f"signature diversity of {name} ({value:.3f}) fell below {self.threshold} at step {step}")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"low_layers": sorted(self._low_layers), "last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._low_layers, self._last_step = set(state_dict["low_layers"]), state_dict["last_step"]
