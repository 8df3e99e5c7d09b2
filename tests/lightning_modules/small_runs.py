"""A small text, a small network, and what a run wrote for TensorBoard."""

from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trix.nn import FFNConfig, LanguageModelConfig

SENTENCE = "The quick brown fox jumps over the lazy dog; 0123456789 times.\n"
MakeTrainer = Callable[..., L.Trainer]


def small_network(**changes: Any) -> LanguageModelConfig:
    settings: dict[str, Any] = {"d_model": 16, "num_layers": 2, "n_heads": 2, "context_length": 8}
    return LanguageModelConfig(**(settings | {"ffn": FFNConfig(num_tiles=4)} | changes))


def read_events(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0, "scalars": 0}).Reload()
