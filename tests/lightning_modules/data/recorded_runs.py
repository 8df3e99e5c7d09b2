"""A text, a model that keeps the batches it is given, and a callback that saves wherever one may save."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

TEXT = "".join(f"line {number}: the quick brown fox, déjà vu\n" for number in range(60))

FitFunction = Callable[..., list[Tensor]]


class BatchRecorder(L.LightningModule):
    """Learns nothing; keeps every training input it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0].clone())
        return self.weight**2

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("loss", self.weight)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class KeepEveryCheckpoint(L.Callback):
    """Save at each place where ModelCheckpoint may save: after a batch, after validation, after an epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _save(self, trainer: L.Trainer, name: str) -> None:
        if not trainer.sanity_checking:
            trainer.save_checkpoint(self.folder / f"{name}-{trainer.global_step}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._save(trainer, "epoch")
