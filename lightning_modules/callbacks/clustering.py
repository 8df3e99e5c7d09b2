"""Renew the clusters of hierarchical layers as training moves their signatures."""

from typing import Any

import lightning as L
from torch import nn
from typing_extensions import override

from lightning_modules.errors import UserError
from lightning_modules.routed_layers import routed_layers
from trix.nn import HierarchicalTriXFFN


class ReclusterSchedule(L.Callback):
    """Cluster the signatures of every hierarchical layer anew, every few training steps.

    The exact search gives the same tiles with old clusters, at a higher cost; with ``num_probes`` old clusters cost recall. The
    clusters are part of the layer's state_dict and follow from its signatures alone, so that all ranks get the same.

    Args:
        every_n_steps: training steps between two clusterings.

    Raises:
        ValueError: every_n_steps < 1. As the run starts, UserError: the network has no hierarchical layer.

    Example::

        model:
          init_args:
            network:
              ffn: {kind: hierarchical}
        trainer:
          callbacks+:
          - class_path: ReclusterSchedule
            init_args: {every_n_steps: 50}
    """

    def __init__(self, every_n_steps: int = 100) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps ({every_n_steps}) must be >= 1")
        self.every_n_steps = every_n_steps
        self._last_step = -1

    def check_network(self, network: nn.Module) -> None:
        """Raise UserError unless the network has a hierarchical layer."""
        if not any(isinstance(layer, HierarchicalTriXFFN) for layer in routed_layers(network).values()):
            raise UserError("ReclusterSchedule needs a layer of kind 'hierarchical', which the network has not")

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self.check_network(pl_module)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # With gradients accumulated, several batches belong to one step.
        if trainer.global_step % self.every_n_steps or trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        for layer in routed_layers(pl_module).values():
            if isinstance(layer, HierarchicalTriXFFN):
                layer.recluster()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"last_step": self._last_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._last_step = state_dict["last_step"]
