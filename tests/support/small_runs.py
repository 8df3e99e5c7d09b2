"""A small text, a small network, its checkpoint, and what a run wrote for TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import LanguageModelTask
from trix.nn import FFNConfig, LanguageModelConfig

SENTENCE = "The quick brown fox jumps over the lazy dog; 0123456789 times.\n"
MakeTrainer = Callable[..., L.Trainer]


def small_network(**changes: Any) -> LanguageModelConfig:
    settings: dict[str, Any] = {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8}
    return LanguageModelConfig(**(settings | {"ffn": FFNConfig(num_tiles=4, top_k=1)} | changes))


def read_events(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0, "histograms": 0}).Reload()


def save_checkpoint(task: L.LightningModule, data: L.LightningDataModule | None, path: Path) -> Path:
    """Train one step and save; without data, on a text that the checkpoint does not name."""
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    if data is None:
        trainer.fit(task, TextDataModule(context_length=8).train_dataloader())
    else:
        trainer.fit(task, data)
    trainer.save_checkpoint(path)
    return path


def save_language_model(folder: Path) -> Path:
    """The checkpoint of a small network on a small text, which lies in the folder, too."""
    (folder / "text.txt").write_text(SENTENCE * 30)
    data = TextDataModule(path=str(folder / "text.txt"), context_length=8, batch_size=4)
    torch.manual_seed(0)
    return save_checkpoint(LanguageModelTask(data.vocabulary, small_network()), data, folder / "model.ckpt")
