"""Small networks, data and runs, shared by the tests of tasks, callbacks and commands."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
from hostile_runs import originals
from lightning.pytorch.loggers import TensorBoardLogger
from page_figures import drawn_figures, undrawn_figures
from small_runs import SENTENCE, MakeTrainer, small_network

from lightning_modules.data.digits import DigitsDataModule
from lightning_modules.data.text import TextDataModule
from lightning_modules.tasks import ClassifierTask, LanguageModelTask
from trix.nn import ClassifierConfig, FFNConfig

__all__ = ["drawn_figures", "originals", "undrawn_figures"]


@pytest.fixture
def text(tmp_path: Path) -> TextDataModule:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCE * 30)
    # 185 validation characters: 23 windows of 8, so that the last batch of 5 is smaller.
    return TextDataModule(path=path, context_length=8, batch_size=5, batches_per_epoch=4)


@pytest.fixture
def language_model(text: TextDataModule) -> LanguageModelTask:
    L.seed_everything(0)
    return LanguageModelTask(text.vocabulary, small_network())


@pytest.fixture
def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=128)


@pytest.fixture
def classifier(digits: DigitsDataModule) -> ClassifierTask:
    L.seed_everything(0)
    network = ClassifierConfig(16, 2, 2, context_length=8, ffn=FFNConfig(num_tiles=4, top_k=1))
    return ClassifierTask(8, digits.num_classes, digits.class_names, network)


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    """make_trainer(**trainer arguments): quiet, on the CPU, two steps and one validation unless told otherwise."""

    def make(**arguments: Any) -> L.Trainer:
        defaults = {"max_steps": 2, "val_check_interval": 2, "num_sanity_val_steps": 0, "logger": False}
        defaults |= {"enable_checkpointing": False}
        return L.Trainer(
            **(defaults | arguments),
            accelerator="cpu",
            default_root_dir=tmp_path,
            enable_progress_bar=False,
            enable_model_summary=False,
        )

    return make


@pytest.fixture
def tensorboard(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name="logs", default_hp_metric=False)
