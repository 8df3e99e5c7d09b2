"""A callback that gives every process random numbers of its own, for runs of several processes."""

import lightning as L
import torch


class UnevenDraws(L.Callback):
    """As training starts, each process draws as many numbers as its rank says."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        torch.rand(trainer.global_rank)
