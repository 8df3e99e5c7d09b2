"""Fixtures: a small text on disk, and a training run that tells which batches it saw."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from recorded_runs import TEXT, BatchRecorder, FitFunction, KeepEveryCheckpoint
from torch import Tensor


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def fit(tmp_path: Path) -> FitFunction:
    """fit(datamodule, ckpt_path=None, callbacks=(), **trainer arguments) -> the training inputs in order."""

    def run(
        datamodule: L.LightningDataModule, ckpt_path: Path | None = None, callbacks: Any = (), **arguments: Any
    ) -> list[Tensor]:
        model = BatchRecorder()
        trainer = L.Trainer(
            **({"max_epochs": 3, "accelerator": "cpu"} | arguments),
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True)
        return model.seen

    return run


@pytest.fixture
def keep_every_checkpoint(tmp_path: Path) -> KeepEveryCheckpoint:
    return KeepEveryCheckpoint(tmp_path)
