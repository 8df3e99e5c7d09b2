"""Next-token prediction."""

from dataclasses import asdict

import lightning as L
import torch
from torch import Tensor
from torch.optim import AdamW
from typing_extensions import override

from lightning_modules.errors import UserError
from lightning_modules.tasks.routed_task import (
    Batch,
    LRSchedulerCallable,
    OptimizerCallable,
    RoutedTask,
    as_config,
    default_lr_scheduler,
)
from trix.nn import LanguageModel, LanguageModelConfig


class LanguageModelTask(RoutedTask):
    """Train a LanguageModel to say the next character: mean cross entropy over all positions, in nats.

    Logged: ``train/loss``, ``val/loss``, ``val/perplexity`` = exp(val/loss); the same under ``test/``.

    Shape:
        batches: (token_BT, target_BT), both int64 in [0, len(vocabulary)).

    Args:
        vocabulary: the characters, in the order of their token ids.
        network: size and kind of the network.
        optimizer: makes the optimizer from the parameters.
        lr_scheduler: makes the schedule from the optimizer and trainer.max_steps; stepped every step.

    Raises:
        ValueError: an empty vocabulary or one with a character twice, and as LanguageModel.
    """

    task_name = "language_model"
    network: LanguageModel

    def __init__(
        self,
        vocabulary: str,
        network: LanguageModelConfig = LanguageModelConfig(),  # noqa: B008 (frozen)
        optimizer: OptimizerCallable = lambda parameters: AdamW(parameters, lr=2e-3, weight_decay=0.1),
        lr_scheduler: LRSchedulerCallable | None = default_lr_scheduler,
    ) -> None:
        if not isinstance(vocabulary, str):  # the data that the command line took it from has none
            raise ValueError(f"vocabulary ({vocabulary}) must be a str: a language model needs data with a vocabulary")
        if not vocabulary or len(set(vocabulary)) != len(vocabulary):
            raise ValueError(
                f"vocabulary ({len(vocabulary)} characters, {len(set(vocabulary))} distinct) must be >= 1 distinct characters"
            )
        network = as_config(LanguageModelConfig, network)
        super().__init__(LanguageModel(len(vocabulary), network), optimizer, lr_scheduler)
        self.vocabulary = vocabulary
        self.save_hyperparameters({"vocabulary": vocabulary, "network": asdict(network)})

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the labels mean, by index: the characters, written so that spaces can be seen."""
        return tuple(repr(character) for character in self.vocabulary)

    @override
    def check_data(self, datamodule: L.LightningDataModule) -> None:
        num_classes = getattr(datamodule, "num_classes", None)
        if num_classes is not None:
            kind = type(datamodule).__name__
            raise UserError(f"the labels of {kind} ({num_classes} classes) must be next characters: use ClassifierTask")
        length, limit = getattr(datamodule, "context_length", 0), self.network.config.context_length
        if length > limit:
            raise UserError(f"data.context_length ({length}) must be <= network.context_length ({limit})")

    def compute_metrics(self) -> dict[str, Tensor]:
        return {"perplexity": self.mean_loss.compute().exp()}

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """After each token of the batch, the most probable next one and its probability, both [B, T]."""
        probability, next_token = torch.softmax(self(batch[0]), dim=-1).max(dim=-1)
        return {"next_token": next_token, "probability": probability}
